"""BMP: its header. It has nothing beside its pixels that a decoder reads."""

from __future__ import annotations

import struct

from diffuserve.images.stripped import PictureLimits, Stripped, damaged, ends_early, unsupported

SIGNATURE = b"BM"

_OLD_HEADER_BYTES = 12  # OS/2's, whose sides have 16 bits
_PLAIN, _BIT_FIELDS = 0, 3


def strip(data: bytes, limits: PictureLimits) -> Stripped:
    """The picture of a BMP.

    Raises:
        InvalidRequest: it is too large, damaged, incomplete, or compressed, which next to no BMP is.
    """
    if len(data) < 34:
        raise ends_early("BMP")
    start, header_bytes = struct.unpack_from("<II", data, 10)
    compression = _PLAIN
    if header_bytes == _OLD_HEADER_BYTES:
        width, height, bits = struct.unpack_from("<HH2xH", data, 18)
    elif header_bytes >= 40:
        width, height, bits, compression = struct.unpack_from("<ii2xHI", data, 18)
        height = abs(height)  # a negative one has the first row on top
    else:
        raise damaged("BMP", f"its header claims {header_bytes} bytes")
    limits.check_size(width, height)
    if compression not in (_PLAIN, _BIT_FIELDS):
        raise unsupported("A compressed BMP")
    row_bytes = -(-width * bits // 32) * 4
    if max(start, 14 + header_bytes) + row_bytes * height > len(data):
        raise ends_early("BMP")
    return Stripped(data, (width, height))
