"""WebP (RFC 9649) down to the chunks that its pixels need: of an animation, the first frame."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from diffuserve.images.stripped import PictureLimits, Stripped, damaged, ends_early

SIGNATURE = b"RIFF"
KIND = b"WEBP"  # after the signature and the size

_ANIMATED = 0x02


def strip(data: bytes, limits: PictureLimits) -> Stripped:
    """The picture of a WebP.

    Raises:
        InvalidRequest: it is too large, damaged or incomplete.
    """
    chunks: dict[bytes, bytes] = {}
    for name, body in _chunks(data):
        if not chunks:
            if name not in _SIZES:
                raise damaged("WebP", "it does not begin with a picture")
            first, size = name, _SIZES[name](body)
            limits.check_size(*size)
        chunks.setdefault(name, body)
    if not chunks:
        raise damaged("WebP", "it is empty")
    kept = [first]
    if first == b"VP8X":
        kept += [b"ANIM", b"ANMF"] if chunks[first][0] & _ANIMATED else [b"ALPH", b"VP8 ", b"VP8L"]
    inside = KIND + b"".join(_chunk(name, chunks[name]) for name in kept if name in chunks)
    return Stripped(
        SIGNATURE + struct.pack("<I", len(inside)) + inside,
        size,
        exif=chunks.get(b"EXIF", b""),
        icc_profile=chunks.get(b"ICCP", b""),
    )


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    if len(data) < 12:
        raise ends_early("WebP")
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        raise ends_early("WebP")
    at = 12
    while at + 8 <= end:
        name, size_bytes = struct.unpack_from("<4sI", data, at)
        if at + 8 + size_bytes > end:
            raise ends_early("WebP")
        yield name, data[at + 8 : at + 8 + size_bytes]
        at += 8 + size_bytes + size_bytes % 2


def _chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def _canvas(body: bytes) -> tuple[int, int]:
    if len(body) < 10:
        raise damaged("WebP", "its header is too short")
    return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")


def _lossy(body: bytes) -> tuple[int, int]:
    """Of a key frame (RFC 6386, section 9.1)."""
    if len(body) < 10 or body[3:6] != b"\x9d\x01\x2a":
        raise damaged("WebP", "its picture has no header")
    width, height = struct.unpack_from("<HH", body, 6)
    return width & 0x3FFF, height & 0x3FFF


def _lossless(body: bytes) -> tuple[int, int]:
    """RFC 9649, section 3.4."""
    if len(body) < 5 or body[0] != 0x2F:
        raise damaged("WebP", "its picture has no header")
    bits = int.from_bytes(body[1:5], "little")
    return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)


_SIZES = {b"VP8X": _canvas, b"VP8 ": _lossy, b"VP8L": _lossless}
