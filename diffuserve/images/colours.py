"""Colours of a picture with a profile, in sRGB."""

from __future__ import annotations

import io
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PROFILE_BYTES = 4 * 2**20  # the largest, those for printing, have 3 MB


def srgb_from(image: Image, icc_profile: bytes | None) -> Image:
    """The picture in sRGB, with perceptual intent.

    A profile that is missing, broken, too large, or for other channels than the picture's is ignored: without one, RGB and
    greys are sRGB's already, and CMYK is ink as plain subtraction has it.

    Args:
        image: of mode L, RGB or CMYK.
        icc_profile: ICC.1, may be missing or empty.

    Returns:
        An image of mode RGB.
    """
    if icc_profile and len(icc_profile) <= MAX_PROFILE_BYTES:
        from PIL import ImageCms

        with suppress(Exception):  # of several kinds, also where the channels differ
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
            transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), image.mode, "RGB")
            return transform.apply(image)
    return image.convert("RGB")
