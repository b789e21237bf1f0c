"""Pixels to image files."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

_EXIF_IFD = 0x8769
_USER_COMMENT = 0x9286
_COMMENT_BYTES = 65_000  # a JPEG's EXIF block has 64 KiB, and the rest is more than the tags around it take


def encode_image(pixels: NDArray[np.uint8], format: str, parameters: str = "") -> bytes:
    """One image as the bytes of a file.

    Args:
        pixels: (H, W, 3) uint8, RGB.
        format: png, jpeg, webp, or raw, which is the pixels themselves, row by row.
        parameters: text that describes how it was drawn: in PNG the text chunk `parameters`, in JPEG and WebP the EXIF
            user comment, both where AUTOMATIC1111's web UI puts it; raw carries none. A user comment has room for 32,500
            units of UTF-16, more than a request within the default limits comes to; of a longer text the lines before
            the last, which are the prompts, are cut.
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
            exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + _cut(parameters)
        image.save(stream, format, quality=95, exif=exif)
    return stream.getvalue()


def _cut(parameters: str) -> bytes:
    """In UTF-16, big-endian, within `_COMMENT_BYTES`."""
    prompts, line_end, settings = (part.encode("utf-16-be") for part in parameters.rpartition("\n"))
    room = max(0, _COMMENT_BYTES - len(line_end + settings))
    cut = (prompts[:room] + line_end + settings)[:_COMMENT_BYTES]
    return cut.decode("utf-16-be", errors="ignore").encode("utf-16-be")  # without half a pair of surrogates
