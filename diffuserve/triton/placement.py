"""What `assemble` put beside a model's model.py, and the check of it at every start.

`assemble` verifies every byte of the bundle that it places; a start compares samples of each file
(`diffuserve.bundle.file_samples`, which says what they cannot see). A repository may be copied in any way, lie in an image's layer
or on a volume that cannot be written, and be started many times at once: nothing is remembered beside it. Damage that the
samples miss is found by assembling again from the bundle.

What engines have compiled of these files is theirs to check (`diffuserve.engines.compiled_cache`): it may be made anew.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from diffuserve.bundle.file_samples import FileSample, sample_file
from diffuserve.bundle.manifest import Component, ModelSpec
from diffuserve.errors import BundleError
from diffuserve.files import write_whole

PLACEMENT_NAME = "placement.json"
VERSION = "1"
"""The folder of the only version that `assemble` makes of a model."""
_AGAIN = "Assemble the repository again: diffuserve assemble BUNDLE"


class Placement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A bundle's part in one Triton model; `component` is None for an in-flight model, which runs no engine itself.
    `bundle_sha256` is the same in an in-flight model and its stages (`diffuserve.triton.repository`)."""

    model: ModelSpec
    bundle_sha256: str
    component: Component | None
    files: tuple[FileSample, ...]


def write_placement(version_folder: Path, placement: Placement) -> None:
    """Writes placement.json; do it last, since its presence says that the folder is complete."""
    data = msgspec.json.format(msgspec.json.encode(placement), indent=2)
    write_whole(version_folder / PLACEMENT_NAME, data + b"\n")


def described_placement(version_folder: Path) -> Placement:
    """Reads placement.json, and none of the files that it describes.

    Raises:
        BundleError: nothing was assembled here, or it cannot be read.
    """
    path = version_folder / PLACEMENT_NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=Placement)
    except FileNotFoundError:
        raise BundleError(f"{version_folder} holds no engine: {PLACEMENT_NAME} is missing. {_AGAIN}") from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}.") from error
    except msgspec.DecodeError as error:
        raise BundleError(f"{path} is damaged or of another version: {error}. {_AGAIN}") from error


def read_placement(version_folder: Path) -> Placement:
    """Reads placement.json and checks that the files are the ones it describes.

    Raises:
        BundleError: nothing was assembled here, or a file has changed since, or cannot be read.
    """
    placement = described_placement(version_folder)
    for file in placement.files:
        try:
            same = sample_file(version_folder, version_folder / file.name) == file
        except FileNotFoundError:
            raise BundleError(f"{version_folder / file.name} is missing. {_AGAIN}") from None
        except OSError as error:
            raise BundleError(f"{version_folder / file.name} cannot be read: {error.strerror}.") from error
        if not same:
            raise BundleError(f"{version_folder / file.name} has changed since it was assembled. {_AGAIN}")
    return placement
