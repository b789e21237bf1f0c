"""PNG (W3C Recommendation, third edition) down to the chunks that its pixels need.

Texts, time stamps and the frames of an animation stay unread, compressed ones uninflated, so that none can grow in memory.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from diffuserve.images.stripped import MAX_PROFILE_BYTES, PictureLimits, Stripped, damaged, ends_early, unsupported

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_GREY, _RGB, _PALETTE = 0, 2, 3
# Samples a pixel and the bits that a sample may have, by colour type (table 8).
_SAMPLES = {_GREY: 1, _RGB: 3, _PALETTE: 1, 4: 2, 6: 4}
_DEPTHS = {_GREY: (1, 2, 4, 8, 16), _RGB: (8, 16), _PALETTE: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
# The passes of interlacing: left, top, and the steps to the right and down (section 8.1).
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_PIECE_BYTES = 2**16


def strip(data: bytes, limits: PictureLimits) -> Stripped:
    """The picture of a PNG; of an animation, the one that is shown where animations are not.

    Raises:
        InvalidRequest: it is too large, damaged or incomplete.
    """
    used: dict[bytes, list[memoryview]] = {name: [] for name in (b"IHDR", b"PLTE", b"tRNS", b"iCCP", b"eXIf", b"IDAT")}
    for name, body in _chunks(data, used):
        if name == b"IHDR":
            width, height, bits, colour, interlaced = _header(body)
            limits.check_size(width, height)
        used[name].append(body)
    once = {name: bytes(bodies[0]) for name, bodies in used.items() if bodies}
    pixels = b"".join(used[b"IDAT"])
    _check_complete(pixels, _raw_bytes(width, height, bits * _SAMPLES[colour], interlaced))

    kept = [(b"IHDR", once[b"IHDR"])]
    if colour == _PALETTE:
        palette = once.get(b"PLTE", b"")
        if len(palette) % 3 or not 3 <= len(palette) <= 3 << bits:
            raise damaged("PNG", f"its palette has {len(palette)} bytes")
        kept.append((b"PLTE", palette))
        if b"tRNS" in once:
            kept.append((b"tRNS", once[b"tRNS"][: len(palette) // 3]))
    return Stripped(
        SIGNATURE + b"".join(map(_chunk, *zip(*kept, (b"IDAT", pixels), (b"IEND", b""), strict=True))),
        (width, height),
        exif=once.get(b"eXIf", b""),
        icc_profile=_profile(once.get(b"iCCP", b"")),
        transparent=_transparent(once[b"tRNS"], colour, bits) if b"tRNS" in once else None,
    )


def _chunks(data: bytes, used: dict[bytes, list[memoryview]]) -> Iterator[tuple[bytes, memoryview]]:
    """Name and body of the chunks up to the end that are used, each of the right checksum."""
    view = memoryview(data)
    at = len(SIGNATURE)
    while True:
        if at + 12 > len(data):
            raise ends_early("PNG")
        size_bytes, name = struct.unpack_from(">I4s", data, at)
        after = at + 12 + size_bytes
        if at == len(SIGNATURE) and name != b"IHDR":
            raise damaged("PNG", "it does not begin with a header")
        if after > len(data):
            raise ends_early("PNG")
        if name == b"IEND":
            return
        if name in used:
            if zlib.crc32(view[at + 4 : after - 4]) != int.from_bytes(view[after - 4 : after], "big"):
                raise damaged("PNG", "a checksum is wrong")
            if name == b"IHDR" and at != len(SIGNATURE):
                raise damaged("PNG", "it has two headers")
            yield name, view[at + 8 : after - 4]
        at = after


def _header(body: memoryview) -> tuple[int, int, int, int, bool]:
    """Width, height, bits a sample, colour type, and whether it is interlaced."""
    if len(body) != 13:
        raise damaged("PNG", f"its header has {len(body)} bytes")
    width, height, bits, colour, compression, filtering, interlacing = struct.unpack(">IIBBBBB", body)
    if bits not in _DEPTHS.get(colour, ()) or compression or filtering or interlacing > 1:
        raise damaged("PNG", "its header describes no kind of PNG that there is")
    return width, height, bits, colour, bool(interlacing)


def _raw_bytes(width: int, height: int, bits_a_pixel: int, interlaced: bool) -> int:
    """How many bytes the pixels have once inflated, with a filter's byte before each row (section 7.2)."""
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    sizes = ((-(-(width - left) // right), -(-(height - top) // down)) for left, top, right, down in passes)
    return sum(rows * (1 + -(-columns * bits_a_pixel // 8)) for columns, rows in sizes if columns > 0)


def _check_complete(pixels: bytes, needed: int) -> None:
    """Inflates no more than is needed, and keeps nothing of it: Pillow's decoder leaves rows that are missing black."""
    inflater = zlib.decompressobj()
    try:
        for start in range(0, len(pixels), _PIECE_BYTES):
            rest = pixels[start : start + _PIECE_BYTES]
            while needed > 0 and (piece := inflater.decompress(rest, min(needed, 2**20))):
                needed -= len(piece)
                rest = inflater.unconsumed_tail
    except zlib.error:
        raise damaged("PNG", "its pixels cannot be inflated") from None
    if needed > 0:
        raise ends_early("PNG")


def _transparent(body: bytes, colour: int, bits: int) -> tuple[int, ...] | None:
    """The transparent colour of a picture without a palette, on the scale to which Pillow decodes."""
    if colour not in (_GREY, _RGB):
        return None
    if len(body) != 2 * _SAMPLES[colour]:
        raise damaged("PNG", f"its transparent colour has {len(body)} bytes")
    if colour == _RGB and bits == 16:
        raise unsupported("A PNG of 16-bit RGB with a transparent colour")  # Pillow decodes its upper bytes only
    scale = 1 if bits == 16 else 255 // (2**bits - 1)
    return tuple((value & (2**bits - 1)) * scale for value in struct.unpack(f">{_SAMPLES[colour]}H", body))


def _profile(body: bytes) -> bytes:
    """The inflated colour profile; empty if it is broken or larger than any real one."""
    _, _, compressed = body.partition(b"\0")
    try:
        profile = zlib.decompressobj().decompress(compressed[1:], MAX_PROFILE_BYTES + 1)
    except zlib.error:
        return b""
    return profile if len(profile) <= MAX_PROFILE_BYTES else b""


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", len(body), name) + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(name)))
