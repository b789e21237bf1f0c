"""What was compiled is loaded only as it was written: an entry that has changed since is made anew."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from diffuserve.bundle.manifest import Component, Manifest
from diffuserve.engines import load_engine
from diffuserve.engines.compiled_cache import CompiledCache, compiled_beside
from diffuserve.tensors import TEXT_ENCODER
from diffuserve.triton.placement import PLACEMENT_NAME
from diffuserve_export.repository.assemble import repository_from_bundle
from tests.core.tiny_graphs import make_real_bundle

ENGINES = ("onnxruntime", "openvino")


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return make_real_bundle(tmp_path / "bundle")


@pytest.fixture
def path(manifest: Manifest, tmp_path: Path) -> Path:
    return tmp_path / "bundle" / TEXT_ENCODER / "model.onnx"


def on(engine: str, manifest: Manifest) -> Component:
    return msgspec.structs.replace(manifest.components[TEXT_ENCODER], engine=engine)


def contents(entry: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in entry.iterdir()}


def largest(entry: Path) -> Path:
    """The file that holds the weights."""
    return max(entry.iterdir(), key=lambda file: file.stat().st_size)


def change_weights(entry: Path) -> None:
    """So that the engine loads them all the same: the lowest bits of numbers in the middle."""
    data = bytearray(largest(entry).read_bytes())
    for at in range(len(data) // 2, len(data) // 2 + 400, 4):
        data[at + 2] ^= 0x40
    largest(entry).chmod(0o600)
    largest(entry).write_bytes(data)


def add_a_file(entry: Path) -> None:
    (entry / "another").write_bytes(b"")


def lose_the_samples(entry: Path) -> None:
    (entry / "samples.json").unlink()


def damage_the_samples(entry: Path) -> None:
    (entry / "samples.json").write_bytes(b'[{"name": "model.onnx"}]')


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("change", [change_weights, add_a_file, lose_the_samples, damage_the_samples])
def test_a_changed_entry_is_made_anew(
    manifest: Manifest, path: Path, engine: str, change: Callable[[Path], None]
) -> None:
    component = on(engine, manifest)
    inputs = {"input_ids": np.arange(341 * 12, dtype=np.int32).reshape(341, 12)}  # no weight is left unread
    [expected] = load_engine(path, component, threads=1)(inputs).values()
    [entry] = compiled_beside(path, component)
    names = contents(entry).keys()
    change(entry)
    assert compiled_beside(path, component) == []
    [actual] = load_engine(path, component, threads=1)(inputs).values()
    np.testing.assert_array_equal(actual, expected)
    assert compiled_beside(path, component) == [entry]
    assert contents(entry).keys() == names


@pytest.mark.parametrize("engine", ENGINES)
def test_an_entry_is_loaded_again_and_not_made_again(manifest: Manifest, path: Path, engine: str) -> None:
    component = on(engine, manifest)
    load_engine(path, component, threads=1)
    [entry] = compiled_beside(path, component)
    before = {file.name: file.stat().st_mtime_ns for file in entry.iterdir()}
    load_engine(path, component, threads=1)
    assert {file.name: file.stat().st_mtime_ns for file in entry.iterdir()} == before


def test_of_two_that_write_an_entry_at_once_neither_warns(
    manifest: Manifest, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    component = on("onnxruntime", manifest)
    cache = CompiledCache(path, component, "1", {})
    with cache.writing() as first, cache.writing() as second:
        for folder in (first, second):
            assert folder is not None
            (folder / "model").write_text("compiled")
    [entry] = cache.entries()
    assert contents(entry).keys() == {"model", "samples.json"}
    assert compiled_beside(path, component) == [entry]
    assert not list(path.parent.glob(".*.partial"))
    assert caplog.text == ""


def test_a_repository_gets_whole_entries_only(manifest: Manifest, path: Path, tmp_path: Path) -> None:
    component = on("onnxruntime", manifest)
    load_engine(path, component, threads=1)
    [entry] = compiled_beside(path, component)
    folder = tmp_path / "repository" / TEXT_ENCODER / "1"
    repository_from_bundle(tmp_path / "bundle", tmp_path / "repository")
    assert contents(folder / entry.name) == contents(entry)
    assert compiled_beside(folder / "model.onnx", component) == [folder / entry.name]
    shutil.rmtree(folder / entry.name)  # its files may be the same as the bundle's
    largest(entry).write_bytes(random.Random(5).randbytes(largest(entry).stat().st_size))  # noqa: S311
    repository_from_bundle(tmp_path / "bundle", tmp_path / "repository")
    assert not (folder / entry.name).exists()
    assert (folder / PLACEMENT_NAME).is_file()
