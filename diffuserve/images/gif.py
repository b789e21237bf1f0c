"""GIF (CompuServe, version 89a) down to its first frame."""

from __future__ import annotations

import struct

from diffuserve.images.stripped import PictureLimits, Stripped, damaged, ends_early

SIGNATURE = b"GIF8"

_EXTENSION, _FRAME, _END = b"!", b",", b";"
_CONTROL = 0xF9


def strip(data: bytes, limits: PictureLimits) -> Stripped:
    """The first frame of a GIF, on the canvas that it and the screen need.

    Raises:
        InvalidRequest: it is too large, damaged or incomplete.
    """
    try:
        return _first_frame(data, limits)
    except (struct.error, IndexError):
        raise ends_early("GIF") from None


def _first_frame(data: bytes, limits: PictureLimits) -> Stripped:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + _palette_bytes(flags)
    palette = data[13:at]
    transparent: int | None = None
    while data[at : at + 1] == _EXTENSION:
        start = at + 2
        at = _after_blocks(data, start)
        if data[start - 1] == _CONTROL and data[start] >= 4:
            transparent = data[start + 4] if data[start + 1] & 1 else None
    if data[at : at + 1] == _END:
        raise damaged("GIF", "it has no picture")
    if data[at : at + 1] != _FRAME:
        raise ends_early("GIF") if at >= len(data) else damaged("GIF", "an unknown block is in it")
    left, top, columns, rows, frame_flags = struct.unpack_from("<HHHHB", data, at + 1)
    limits.check_size(columns, rows)
    width, height = max(width, left + columns), max(height, top + rows)
    limits.check_size(width, height)
    end = _after_blocks(data, at + 10 + _palette_bytes(frame_flags) + 1)

    # A screen of the canvas's size, and no way of disposal, both of which Pillow would act on.
    header = data[:6] + struct.pack("<HHBBB", width, height, flags, 0, 0) + palette
    control = b"" if transparent is None else struct.pack("<BBBBHBB", 0x21, _CONTROL, 4, 1, 0, transparent, 0)
    covered = (left, top, left + columns, top + rows)
    return Stripped(
        header + control + data[at:end] + _END,
        (width, height),
        covered=None if covered == (0, 0, width, height) else covered,
    )


def _palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _after_blocks(data: bytes, at: int) -> int:
    """Where a chain of blocks, each with its length before it, is over."""
    while data[at]:
        at += 1 + data[at]
    return at + 1
