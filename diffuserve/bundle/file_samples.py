"""Whether a file is the one of before, told at every start from its size and a checksum of samples of it.

Hashing gigabytes would cost as much as loading them does. So small files are hashed whole, and of a large one 256 blocks of
16 KiB, evenly spaced from its first byte to its last. Only contents count, not times, owners or links.

What the samples see: a file of another model or export, since weights differ throughout; one cut short or appended to; any
damage that is longer than the distance between two blocks, a 255th of the file. What they can miss is a shorter one, down to
a single bit.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

_BLOCKS = 256
_BLOCK_BYTES = 16 << 10


class FileSample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file in a folder; `sample_sha256` is in hex, of the blocks, or of the whole file where they would cover it."""

    name: str
    size_bytes: int
    sample_sha256: str


def sample_file(folder: Path, path: Path) -> FileSample:
    """The sample of `path`, which lies below `folder`.

    Raises:
        OSError: it cannot be read.
    """
    size_bytes = path.stat().st_size
    return FileSample(path.relative_to(folder).as_posix(), size_bytes, _sample_sha256(path, size_bytes))


def _sample_sha256(path: Path, size_bytes: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        if size_bytes <= _BLOCKS * _BLOCK_BYTES:
            digest.update(stream.read())
            return digest.hexdigest()
        for block in range(_BLOCKS):
            stream.seek((size_bytes - _BLOCK_BYTES) * block // (_BLOCKS - 1))
            digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()
