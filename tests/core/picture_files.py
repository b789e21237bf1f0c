"""Picture files made byte by byte from known pixels, for the formats in which that takes a few lines, and what may be put
into the others: EXIF, ICC profiles, chunks."""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Samples = NDArray[Any]
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))  # Adam7
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def smooth(height: int, width: int) -> NDArray[np.uint8]:
    """(height, width, 3) that JPEG keeps; every corner is another."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([60 + x * 2, 200 - y * 2, 90 + x + y], axis=2).astype(np.uint8)


def three(levels: Samples) -> Samples:
    """Greys, (H, W), as (H, W, 3)."""
    return np.repeat(levels[..., None], 3, axis=2)


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_header(width: int, height: int, bits: int, colour: int, interlaced: bool = False) -> bytes:
    return SIGNATURE + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced))


def png(
    samples: Samples, bits: int, colour: int, *chunks: tuple[bytes, bytes], interlaced: bool = False, parts: int = 1
) -> bytes:
    """A PNG of (H, W, samples a pixel) whole numbers; `chunks` stand before the pixels, which are in `parts` chunks."""
    height, width = samples.shape[:2]
    passes = PASSES if interlaced else ((0, 0, 1, 1),)
    raw = b"".join(
        b"\0" + _packed(row, bits)
        for top, left, down, right in passes
        for row in samples[top::down, left::right]
        if row.size
    )
    packed = zlib.compress(raw)
    step = -(-len(packed) // parts)
    pixels = b"".join(png_chunk(b"IDAT", packed[at : at + step]) for at in range(0, len(packed), step))
    before = b"".join(png_chunk(name, body) for name, body in chunks)
    return png_header(width, height, bits, colour, interlaced) + before + pixels + png_chunk(b"IEND", b"")


def _packed(row: Samples, bits: int) -> bytes:
    digits = "".join(f"{value:0{bits}b}" for value in row.ravel().tolist())
    digits += "0" * (-len(digits) % 8)
    return int(digits, 2).to_bytes(len(digits) // 8, "big")


def gif(
    indices: Samples,
    palette: Samples,
    *,
    at: tuple[int, int] = (0, 0),
    screen: tuple[int, int] | None = None,
    transparent: int | None = None,
    local: bool = False,
    interlaced: bool = False,
    disposal: int = 0,
) -> bytes:
    """A GIF of one (h, w) frame at (left, top), with a palette of 256 colours. Its codes have nine bits throughout: the table
    is cleared before it would need more."""
    rows, columns = indices.shape
    width, height = screen or (at[0] + columns, at[1] + rows)
    flags = 0x87
    table = palette.astype(np.uint8).tobytes()
    order = (
        [*range(0, rows, 8), *range(4, rows, 8), *range(2, rows, 4), *range(1, rows, 2)] if interlaced else range(rows)
    )
    codes: list[int] = []
    for number, index in enumerate(indices[list(order)].ravel().tolist()):
        codes += [256] if number % 200 == 0 else []
        codes.append(index)
    codes.append(257)
    bits = sum(code << 9 * place for place, code in enumerate(codes)).to_bytes(-(-9 * len(codes) // 8), "little")
    blocks = b"".join(bytes([len(block)]) + block for block in _cut(bits, 255))
    control = struct.pack("<BBBBHBB", 0x21, 0xF9, 4, disposal << 2 | (transparent is not None), 0, transparent or 0, 0)
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", width, height, 0 if local else flags, 0, 0)
        + (b"" if local else table)
        + control
        + b","
        + struct.pack("<HHHHB", *at, columns, rows, (flags if local else 0) | interlaced << 6)
        + (table if local else b"")
        + b"\x08"
        + blocks
        + b"\0;"
    )


def _cut(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def bmp(rows: Samples, bits: int, *, palette: bytes = b"", masks: Sequence[int] = (), top_down: bool = False) -> bytes:
    """A BMP of (H, bytes a row) rows, from the top."""
    height, width = rows.shape[0], rows.shape[1] * 8 // bits
    lines = [row.tobytes() + b"\0" * (-rows.shape[1] % 4) for row in rows]
    pixels = b"".join(lines if top_down else reversed(lines))
    # Masks of four channels need the header of version 4, of 108 bytes.
    extra = struct.pack("<4I", *masks).ljust(68, b"\0") if masks else b""
    header = struct.pack(
        "<IiiHHIIiiII", 40 + len(extra), width, -height if top_down else height, 1, bits, 3 if masks else 0, 0, 0, 0,
        len(palette) // 4, 0,
    )  # fmt: skip
    start = 14 + len(header) + len(extra) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + header + extra + palette + pixels


def encoded(pixels: Samples, format: str, **options: Any) -> bytes:
    """By Pillow."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format, **options)
    return stream.getvalue()


def jpeg_with(data: bytes, *segments: tuple[int, bytes]) -> bytes:
    """With segments (marker, body) after its start."""
    return (
        data[:2] + b"".join(struct.pack(">BBH", 255, kind, 2 + len(body)) + body for kind, body in segments) + data[2:]
    )


def webp_with(data: bytes, width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A lossless WebP of one chunk, extended by others."""
    assert data[12:16] == b"VP8L"
    size_bytes = int.from_bytes(data[16:20], "little")
    flags = 0x08 * any(name == b"EXIF" for name, _ in chunks) | 0x20 * any(name == b"ICCP" for name, _ in chunks)
    canvas = bytes([flags, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    first = [chunk for chunk in chunks if chunk[0] == b"ICCP"]
    last = [chunk for chunk in chunks if chunk[0] != b"ICCP"]
    inside = b"WEBP" + b"".join(
        name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
        for name, body in ((b"VP8X", canvas), *first, (b"VP8L", data[20 : 20 + size_bytes]), *last)
    )
    return b"RIFF" + struct.pack("<I", len(inside)) + inside


def exif(orientation: int, order: str = ">", kind: int = 3) -> bytes:
    """An EXIF block of a maker's name and the orientation, as SHORT (3) or LONG (4)."""
    value = struct.pack(f"{order}H2x" if kind == 3 else f"{order}I", orientation)
    entries = struct.pack(f"{order}HHI4s", 0x010F, 2, 4, b"abc\0") + struct.pack(f"{order}HHI", 0x0112, kind, 1) + value
    start = b"MM\0*" if order == ">" else b"II*\0"
    return start + struct.pack(f"{order}IH", 8, 2) + entries + b"\0\0\0\0"


# Colorants of sRGB, adapted to D50, as the registry's sRGB profiles have them.
COLORANTS = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7142))


def icc(space: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ", kind: bytes = b"mntr") -> bytes:
    """An ICC profile of version 2.4 (ICC.1:2001-04)."""
    table = struct.pack(">I", len(tags))
    body = b""
    start = 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(value))
        body += value + b"\0" * (-len(value) % 4)
    header = struct.pack(">I4xI4s4s4s12x4s", start + len(body), 0x02400000, kind, space, connection, b"acsp")
    header = header.ljust(68, b"\0") + struct.pack(">iii", *_fixed(0.9642, 1.0, 0.8249))
    return header.ljust(128, b"\0") + table + body


def matrix_profile(colorants: Sequence[Sequence[float]] = COLORANTS, gamma: float = 2.2) -> bytes:
    names = (b"rXYZ", b"gXYZ", b"bXYZ")
    tags = {name: _xyz(*colorant) for name, colorant in zip(names, colorants, strict=True)}
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    return icc(b"RGB ", {**tags, b"rTRC": curve, b"gTRC": curve, b"bTRC": curve, **_described()})


def grey_profile(gamma: float) -> bytes:
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    return icc(b"GRAY", {b"kTRC": curve, **_described()})


def cmyk_profile(lightness: Samples) -> bytes:
    """A profile of CMYK in which every corner of the space, (2, 2, 2, 2) by C, M, Y and K, is a grey of lightness 0 .. 255."""
    ramp = bytes(range(256))
    corners = b"".join(bytes([int(level), 128, 128]) for level in lightness.ravel())
    identity = struct.pack(">9i", *_fixed(1, 0, 0, 0, 1, 0, 0, 0, 1))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + 4 * ramp + corners + 3 * ramp
    return icc(b"CMYK", {b"A2B0": lut, **_described()}, b"Lab ", b"prtr")


def _described() -> dict[bytes, bytes]:
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 78
    return {b"desc": text, b"cprt": b"text\0\0\0\0none\0", b"wtpt": _xyz(0.9642, 1.0, 0.8249)}


def _xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">iii", *_fixed(*values))


def _fixed(*values: float) -> list[int]:
    return [round(value * 65536) for value in values]


def srgb_level(linear: float) -> float:
    """0 .. 255 of light 0 .. 1 (IEC 61966-2-1)."""
    return 255 * (12.92 * linear if linear <= 0.0031308 else 1.055 * math.pow(linear, 1 / 2.4) - 0.055)


def laid_on(pixels: Samples, alpha: Samples, background: Sequence[int]) -> NDArray[np.float64]:
    """(H, W, 3) and (H, W) of 0 .. 255 on a colour."""
    share = alpha[..., None] / 255
    result: NDArray[np.float64] = pixels * share + np.asarray(background) * (1 - share)
    return result
