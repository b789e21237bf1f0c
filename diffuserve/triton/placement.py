"""What `assemble` put beside a model's model.py, and the check of it at every start.

A checksum of gigabytes at every start would cost seconds, so it is taken when a repository is assembled; a start compares
each file's size and modification time with what was written down then.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from diffuserve.bundle import Component, ModelSpec
from diffuserve.errors import BundleError
from diffuserve.files import write_whole

PLACEMENT_NAME = "placement.json"


class PlacedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file in a model's version folder; `mtime_ns` as it was when its checksum had been verified."""

    name: str
    size_bytes: int
    mtime_ns: int


class Placement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A bundle's part in one Triton model; `component` is None for stable_diffusion, which runs no engine itself."""

    model: ModelSpec
    bundle_sha256: str
    component: Component | None
    files: tuple[PlacedFile, ...]


def place_file(version_folder: Path, path: Path) -> PlacedFile:
    """The record of `path`, which lies below the version folder."""
    stat = path.stat()
    return PlacedFile(path.relative_to(version_folder).as_posix(), stat.st_size, stat.st_mtime_ns)


def write_placement(version_folder: Path, placement: Placement) -> None:
    """Writes placement.json; do it last, since its presence says that the folder is complete."""
    data = msgspec.json.format(msgspec.json.encode(placement), indent=2)
    write_whole(version_folder / PLACEMENT_NAME, data + b"\n")


def read_placement(version_folder: Path) -> Placement:
    """Reads placement.json and checks that the files are the ones it describes.

    Raises:
        BundleError: nothing was assembled here, or a file has changed since.
    """
    path = version_folder / PLACEMENT_NAME
    again = "Assemble the repository again: diffuserve assemble BUNDLE"
    try:
        placement = msgspec.json.decode(path.read_bytes(), type=Placement)
    except FileNotFoundError:
        raise BundleError(f"{version_folder} holds no engine: {PLACEMENT_NAME} is missing. {again}") from None
    except msgspec.DecodeError as error:
        raise BundleError(f"{path} is damaged: {error}. {again}") from error
    for file in placement.files:
        try:
            stat = (version_folder / file.name).stat()
        except FileNotFoundError:
            raise BundleError(f"{version_folder / file.name} is missing. {again}") from None
        if (stat.st_size, stat.st_mtime_ns) != (file.size_bytes, file.mtime_ns):
            raise BundleError(f"{version_folder / file.name} has changed since it was assembled. {again}")
    return placement
