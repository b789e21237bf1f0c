"""Pixels to image files and previews."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from diffuserve.bundle import Preview
from diffuserve.stages import Float32

_EXIF_IFD = 0x8769
_USER_COMMENT = 0x9286
_EXIF_CHARACTERS = 15_000  # an EXIF block has 64 KiB, and a character of UTF-16 up to four bytes


def encode_image(pixels: NDArray[np.uint8], format: str, parameters: str = "") -> bytes:
    """One image as the bytes of a file.

    Args:
        pixels: (H, W, 3) uint8, RGB.
        format: png, jpeg, webp, or raw, which is the pixels themselves, row by row.
        parameters: text that describes how it was drawn: in PNG the text chunk `parameters`, in JPEG and WebP the EXIF
            user comment, both where AUTOMATIC1111's web UI puts it; raw carries none.
    """
    if format == "raw":
        return pixels.tobytes()
    from PIL import Image, PngImagePlugin

    image = Image.fromarray(pixels)
    stream = io.BytesIO()
    if format == "png":
        text = PngImagePlugin.PngInfo()
        if parameters:
            text.add_text("parameters", parameters)
        # Level 6 takes twice the time of level 3 for a file that is a few per cent smaller.
        image.save(stream, "png", pnginfo=text, compress_level=3)
    else:
        exif = Image.Exif()
        if parameters:
            # EXIF 2.32, 4.6.5: a user comment begins with the name of its character code, padded to eight bytes.
            exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + parameters[:_EXIF_CHARACTERS].encode("utf-16-be")
        image.save(stream, format, quality=95, exif=exif)
    return stream.getvalue()


def preview_from_latents(latents: Float32, preview: Preview) -> NDArray[np.uint8]:
    """A rough image of one pixel a latent pixel, by the bundle's linear map.

    Args:
        latents: (C, h, w) float32, unit variance: the sampler's current estimate of the finished latents.

    Returns:
        (h, w, 3) uint8, RGB.
    """
    rgb = np.tensordot(latents, np.asarray(preview.matrix, np.float32), axes=(0, 0)) + np.asarray(
        preview.bias, np.float32
    )
    pixels: NDArray[np.uint8] = (rgb.clip(0.0, 1.0) * 255.0).round().astype(np.uint8)
    return pixels
