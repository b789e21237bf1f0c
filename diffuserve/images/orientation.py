"""How a camera was held: EXIF's orientation, and pixels turned by it."""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

_MARK = b"Exif\0\0"
_TAG = 0x0112
_SHORT, _LONG = 3, 4


def orientation_of(exif: bytes) -> int:
    """The orientation, 1 .. 8, in the first directory of an EXIF block (EXIF 2.32, 4.6.4; TIFF 6.0, section 2).

    Read here since Pillow warns of every other tag that is broken, through the filters of the whole process, and many
    cameras and editors write such.

    Args:
        exif: may begin with EXIF's mark.

    Returns:
        1, upright, if the block says nothing or is broken.
    """
    exif = exif.removeprefix(_MARK).removeprefix(_MARK)  # JPEG's own, and before it one that some write
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        [at] = struct.unpack_from(f"{order}I", exif, 4)
        [count] = struct.unpack_from(f"{order}H", exif, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, entry)
            if tag == _TAG and kind in (_SHORT, _LONG):
                [value] = struct.unpack_from(f"{order}{'H' if kind == _SHORT else 'I'}", exif, entry + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """A view of (H, W, 3) pixels as they are to be seen.

    The orientation says which sides of the scene the first row and the first column are: 1 top and left, 2 top and right,
    3 bottom and right, 4 bottom and left, 5 left and top, 6 right and top, 7 right and bottom, 8 left and bottom.
    """
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    down = -1 if orientation in (3, 4, 7, 8) else 1
    right = -1 if orientation in (2, 3, 6, 7) else 1
    return pixels[::down, ::right]
