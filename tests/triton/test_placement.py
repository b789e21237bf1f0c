"""What a start accepts of an assembled repository: the same bytes, however they came there."""

from __future__ import annotations

import io
import os
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from diffuserve.bundle.file_samples import sample_file
from diffuserve.errors import BundleError
from diffuserve.triton.placement import PLACEMENT_NAME, Placement, read_placement, write_placement
from diffuserve_export.repository.assemble import repository_from_bundle
from tests.core.fakes import MODEL, make_bundle

LARGE_BYTES = 30_000_001


@pytest.fixture(scope="module")
def assembled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With one large file among them."""
    root = tmp_path_factory.mktemp("assembled")
    make_bundle(root / "bundle")
    repository_from_bundle(root / "bundle", root / "repository")
    place(root / "repository" / "unet" / "1", random.Random(1).randbytes(LARGE_BYTES))  # noqa: S311
    return root / "repository"


def place(folder: Path, content: bytes) -> Path:
    """Writes a file and its placement, as the only one."""
    path = folder / "model.onnx"
    path.unlink(missing_ok=True)  # it may be a link to the bundle's
    path.write_bytes(content)
    write_placement(folder, Placement(MODEL, "ab" * 32, None, (sample_file(folder, path),)))
    return path


def by_copying(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=shutil.copyfile)


def by_tar(source: Path, target: Path) -> None:
    """As it is by default: whole seconds."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        archive.add(source, "repository")
    stream.seek(0)
    with tarfile.open(fileobj=stream) as archive:
        archive.extractall(target.parent, filter="fully_trusted")  # noqa: S202
    (target.parent / "repository").rename(target)


def by_image_layer(source: Path, target: Path) -> None:
    """Built so that the same content always makes the same layer: every time is the epoch's."""
    shutil.copytree(source, target)
    for path in [*target.rglob("*"), target]:
        os.utime(path, (0, 0))


def by_volume(source: Path, target: Path) -> None:
    """As Kubernetes mounts what it may exchange at once: each file a link, by way of a link to the folder of this version."""
    for folder in (path for path in source.rglob("1") if path.is_dir()):
        mounted = target / folder.relative_to(source)
        shutil.copytree(folder, mounted / "..2025_01_02")
        (mounted / "..data").symlink_to("..2025_01_02")
        for file in folder.iterdir():
            (mounted / file.name).symlink_to(Path("..data", file.name))


@pytest.mark.parametrize("copied", [by_copying, by_tar, by_image_layer, by_volume])
def test_a_copy_is_the_same(assembled: Path, tmp_path: Path, copied: Callable[[Path, Path], None]) -> None:
    copied(assembled, tmp_path / "copy")
    before = sorted((tmp_path / "copy").rglob("*"))
    for model in assembled.iterdir():
        assert read_placement(tmp_path / "copy" / model.name / "1") == read_placement(model / "1")
    assert sorted((tmp_path / "copy").rglob("*")) == before  # nothing is written beside it


def damaged_at(content: bytes, start: int, length: int = 1) -> bytes:
    damaged = bytearray(content)
    damaged[start : start + length] = bytes(byte ^ 1 for byte in damaged[start : start + length])
    return bytes(damaged)


def assert_refused(folder: Path, content: bytes) -> None:
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.onnx has changed since it was assembled"):
        read_placement(folder)


def test_any_byte_of_a_small_file_is_seen(tmp_path: Path) -> None:
    content = random.Random(2).randbytes(1000)  # noqa: S311
    place(tmp_path, content)
    for start in range(len(content)):
        assert_refused(tmp_path, damaged_at(content, start))
    assert_refused(tmp_path, content[:-1])
    assert_refused(tmp_path, content + b"\0")
    assert_refused(tmp_path, b"")
    (tmp_path / "model.onnx").write_bytes(content)
    read_placement(tmp_path)


def test_damage_longer_than_between_two_blocks_is_seen_anywhere_in_a_large_file(tmp_path: Path) -> None:
    rng = random.Random(3)  # noqa: S311
    content = rng.randbytes(LARGE_BYTES)
    path = place(tmp_path, content)
    length = LARGE_BYTES // 255
    for start in (0, LARGE_BYTES - length, *(rng.randrange(LARGE_BYTES - length) for _ in range(30))):
        assert_refused(tmp_path, damaged_at(content, start, length))
    # Its ends, to the byte.
    assert_refused(tmp_path, damaged_at(content, 0))
    assert_refused(tmp_path, damaged_at(content, LARGE_BYTES - 1))
    assert_refused(tmp_path, content[:-1])
    assert_refused(tmp_path, content + b"\0")
    # Another model's of the same size.
    assert_refused(tmp_path, rng.randbytes(LARGE_BYTES))
    # A copy that made room for the whole file and was interrupted.
    assert_refused(tmp_path, content[: LARGE_BYTES * 9 // 10] + bytes(LARGE_BYTES - LARGE_BYTES * 9 // 10))
    path.unlink()
    with pytest.raises(BundleError, match=r"model\.onnx is missing"):
        read_placement(tmp_path)
    path.mkdir()
    with pytest.raises(BundleError, match=r"model\.onnx cannot be read: Is a directory"):
        read_placement(tmp_path)


def test_what_an_earlier_version_wrote_is_named(tmp_path: Path) -> None:
    place(tmp_path, b"a model")
    placement = tmp_path / PLACEMENT_NAME
    placement.write_text(placement.read_text().replace("sample_sha256", "mtime_ns"))
    with pytest.raises(BundleError, match=r"placement\.json is damaged or of another version: .*diffuserve assemble"):
        read_placement(tmp_path)
