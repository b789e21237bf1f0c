"""Contact sheets: all images of a run on one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from diffuserve.images.encoding import encode_image

_JPEG_TEXT_CHARS = 30_000  # JPEG's EXIF segment holds 64 kB, and its text is UTF-16


def columns_for(counts: Sequence[int]) -> int:
    """Columns of a sheet of `counts[i]` images of prompt i: a row a prompt where that gives equal rows of several
    images, else as near to a square as the number allows."""
    if len(counts) > 1 and len(set(counts)) == 1 and counts[0] > 1:
        return counts[0]
    return math.ceil(math.sqrt(sum(counts)))


def contact_sheet(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Puts the images side by side, row by row, on white; cells have the size of the largest image.

    Args:
        images: at least one, of any size and mode.
        columns: at least 1.

    Returns:
        An RGB image.
    """
    width = max(image.width for image in images)
    height = max(image.height for image in images)
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        left = column * width + (width - image.width) // 2
        top = row * height + (height - image.height) // 2
        sheet.paste(image.convert("RGB"), (left, top))
    return sheet


def encode_sheet(sheet: Image.Image, format: str, parameters: Sequence[str]) -> bytes:
    """The sheet as a png, jpeg or webp file that carries the texts of all its images, in order, a blank line between;
    a text that several images share stands once. JPEG has room for the first 30,000 characters."""
    text = "\n\n".join(dict.fromkeys(parameters))
    if format == "jpeg":
        text = text[:_JPEG_TEXT_CHARS]
    return encode_image(np.asarray(sheet), format, text)
