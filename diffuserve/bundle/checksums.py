"""The files of a bundle, as its manifest lists them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from diffuserve.bundle.manifest import File, Manifest
from diffuserve.errors import BundleError


def sha256_of(path: Path, start: int = 0) -> str:
    """SHA-256 of a file's content from the byte `start` on, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        stream.seek(start)
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def describe_file(root: Path, path: Path) -> File:
    """The manifest's entry for `path`, which lies below `root`."""
    return File(path.relative_to(root).as_posix(), path.stat().st_size, sha256_of(path))


def sha256_of_files(files: Iterable[File]) -> str:
    """One hash over names and contents, whatever the order."""
    lines = sorted(f"{file.sha256}  {file.path}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def verify(bundle: Path, manifest: Manifest) -> None:
    """Compares every file with its size and checksum.

    Raises:
        BundleError: a file is missing or differs; it is named.
    """
    for file in manifest.all_files():
        path = bundle / file.path
        if not path.resolve().is_relative_to(bundle.resolve()):
            raise BundleError(
                f"{bundle}: the manifest names {file.path!r}, which lies outside the bundle. Do not use it."
            )
        if not path.is_file():
            raise BundleError(f"{path} is missing. Export the checkpoint again.")
        if path.stat().st_size != file.size_bytes or sha256_of(path) != file.sha256:
            raise BundleError(
                f"{path} is damaged: its checksum differs from the manifest's. Export the checkpoint again."
            )
