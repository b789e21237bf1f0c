"""JPEG (ITU-T T.81) down to the segments that its pixels need.

Thumbnails, comments, and whatever follows the picture (a second view, a gain map, a film) stay unread.
"""

from __future__ import annotations

import re

from diffuserve.images.stripped import PictureLimits, Stripped, damaged, ends_early, unsupported

SIGNATURE = b"\xff\xd8\xff"
# A progressive JPEG of few bytes may ask for thousands of scans of all pixels; real ones have some 10.
MAX_SCANS = 100

_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, with Huffman codes
_OTHER_FRAMES = (0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
_TABLES = (0xC4, 0xDB, 0xDD)  # Huffman codes, quantisation, restart interval
_ALONE = (0x01, *range(0xD0, 0xD8))  # markers without a segment
_JFIF, _APP1, _APP2, _ADOBE = 0xE0, 0xE1, 0xE2, 0xEE  # JFIF's and Adobe's say which colours the components are
_EXIF, _PROFILE = b"Exif\0\0", b"ICC_PROFILE\0"
# A marker in coded data: neither a stuffed zero nor a restart, maybe after fill bytes.
_AFTER_SCAN = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")


def strip(data: bytes, limits: PictureLimits) -> Stripped:
    """The first picture of a JPEG.

    Raises:
        InvalidRequest: it is too large, damaged, incomplete, or of a rare kind.
    """
    kept = [data[:2]]
    size: tuple[int, int] | None = None
    exif = b""
    profile: dict[int, bytes] = {}
    scans = 0
    at = 2
    while True:
        at = data.find(b"\xff", at)
        while data[at : at + 2] == b"\xff\xff":
            at += 1
        if at < 0 or at + 2 > len(data):
            raise ends_early("JPEG")
        marker = data[at + 1]
        if marker == _EOI:
            break
        if marker in _ALONE or marker in (0, _SOI):
            at += 2
            continue
        after = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if max(after, at + 4) > len(data):
            raise ends_early("JPEG")
        if after < at + 4:
            raise damaged("JPEG", "a segment is shorter than its own length")
        body = data[at + 4 : after]
        if marker in _OTHER_FRAMES:
            raise unsupported("A JPEG that is lossless, hierarchical or arithmetically coded")
        if marker in _FRAMES:
            if size:
                raise damaged("JPEG", "it has two frames")
            size = _size(body)
            limits.check_size(*size)
        elif marker == _SOS:
            scans += 1
            if scans > MAX_SCANS:
                raise unsupported(f"A JPEG of more than {MAX_SCANS} scans")
            found = _AFTER_SCAN.search(data, after)
            if not found:
                raise ends_early("JPEG")
            after = found.start()
        elif marker == _APP1 and body.startswith(_EXIF):
            exif = exif or body.removeprefix(_EXIF)
        elif marker == _APP2 and body.startswith(_PROFILE) and len(body) > 14:
            profile[body[12]] = body[14:]
        if marker in (*_FRAMES, *_TABLES, _SOS) or _tells_colours(marker, body):
            kept.append(data[at:after])
        at = after
    if not (size and scans):
        raise damaged("JPEG", "it has no picture")
    kept.append(b"\xff\xd9")
    return Stripped(b"".join(kept), size, exif=exif, icc_profile=b"".join(profile[part] for part in sorted(profile)))


def _size(body: bytes) -> tuple[int, int]:
    """Width and height of a frame (T.81, B.2.2)."""
    if len(body) < 6 or len(body) != 6 + 3 * body[5]:
        raise damaged("JPEG", "its frame's header is too short")
    if body[0] != 8:
        raise unsupported(f"A JPEG of {body[0]} bits a sample")
    if body[5] not in (1, 3, 4):
        raise unsupported(f"A JPEG of {body[5]} components")
    return int.from_bytes(body[3:5], "big"), int.from_bytes(body[1:3], "big")


def _tells_colours(marker: int, body: bytes) -> bool:
    if marker == _JFIF:
        return body.startswith(b"JFIF\0") and len(body) >= 14
    return marker == _ADOBE and body.startswith(b"Adobe") and len(body) >= 12
