"""What `assemble` put beside a model's model.py, and the check of it at every start.

`assemble` verifies every byte of the bundle that it places. At a start this would cost as much as loading does, so what is
compared then is a checksum of each file's size and of samples of it: small files whole, of a large one 256 blocks of
16 KiB, evenly spaced from its first byte to its last. Only contents count, not times, owners or links, so a repository
may be copied in any way, lie in an image's layer or on a volume that cannot be written, and be started many times at
once: nothing is remembered beside it.

What the samples see: a file of another model or export, since weights differ throughout; one cut short or appended to; any
damage that is longer than the distance between two blocks, a 255th of the file. What they can miss is a shorter one, down to
a single bit. It is found by assembling again from the bundle, or by comparing the files with their SHA-256 in
placement.json.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from diffuserve.bundle import Component, ModelSpec
from diffuserve.errors import BundleError
from diffuserve.files import write_whole

PLACEMENT_NAME = "placement.json"
_BLOCKS = 256
_BLOCK_BYTES = 16 << 10


class PlacedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file in a model's version folder; `sample_sha256` as `sample_sha256` gave it when its checksum had been verified."""

    name: str
    size_bytes: int
    sample_sha256: str


class Placement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A bundle's part in one Triton model; `component` is None for stable_diffusion, which runs no engine itself."""

    model: ModelSpec
    bundle_sha256: str
    component: Component | None
    files: tuple[PlacedFile, ...]


def sample_sha256(path: Path, size_bytes: int) -> str:
    """SHA-256, in hex, of the blocks of a file of that size; of all of it where the blocks would cover it.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        if size_bytes <= _BLOCKS * _BLOCK_BYTES:
            digest.update(stream.read())
            return digest.hexdigest()
        for block in range(_BLOCKS):
            stream.seek((size_bytes - _BLOCK_BYTES) * block // (_BLOCKS - 1))
            digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()


def place_file(version_folder: Path, path: Path) -> PlacedFile:
    """The record of `path`, which lies below the version folder."""
    size_bytes = path.stat().st_size
    return PlacedFile(path.relative_to(version_folder).as_posix(), size_bytes, sample_sha256(path, size_bytes))


def write_placement(version_folder: Path, placement: Placement) -> None:
    """Writes placement.json; do it last, since its presence says that the folder is complete."""
    data = msgspec.json.format(msgspec.json.encode(placement), indent=2)
    write_whole(version_folder / PLACEMENT_NAME, data + b"\n")


def read_placement(version_folder: Path) -> Placement:
    """Reads placement.json and checks that the files are the ones it describes.

    Raises:
        BundleError: nothing was assembled here, or a file has changed since, or cannot be read.
    """
    path = version_folder / PLACEMENT_NAME
    again = "Assemble the repository again: diffuserve assemble BUNDLE"
    try:
        placement = msgspec.json.decode(path.read_bytes(), type=Placement)
    except FileNotFoundError:
        raise BundleError(f"{version_folder} holds no engine: {PLACEMENT_NAME} is missing. {again}") from None
    except msgspec.DecodeError as error:
        raise BundleError(f"{path} is damaged or of another version: {error}. {again}") from error
    for file in placement.files:
        try:
            same = place_file(version_folder, version_folder / file.name) == file
        except FileNotFoundError:
            raise BundleError(f"{version_folder / file.name} is missing. {again}") from None
        except OSError as error:
            raise BundleError(f"{version_folder / file.name} cannot be read: {error.strerror}.") from error
        if not same:
            raise BundleError(f"{version_folder / file.name} has changed since it was assembled. {again}")
    return placement
