"""A bundle from a stranger, with pickles and native code wherever PyTorch might look: nothing of it is run."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import msgspec
import pytest

from diffuserve.bundle.manifest import read_manifest, write_manifest
from diffuserve.engines import compiled_cache
from diffuserve.engines.compiled_cache import CompiledCache, compiled_beside
from diffuserve.engines.user_folders import private_cache_folder
from diffuserve.tensors import UNET
from tests.core.tiny_graphs import make_real_bundle

# Loads and runs the component; prints what was unpickled, and the files in the folder whose code is mapped to be run.
_PROGRAM = """
import sys
from pathlib import Path
unpickled = []
sys.addaudithook(lambda event, details: unpickled.append(details) if event == "pickle.find_class" else None)
from diffuserve.bundle.manifest import read_manifest
from diffuserve.engines import load_engine
from diffuserve.engines.example_inputs import example_inputs
folder, stage = Path(sys.argv[1]), sys.argv[2]
manifest = read_manifest(folder)
component = manifest.components[stage]
try:
    engine = load_engine(folder / stage / "model.onnx", component, threads=1)
    print(*engine(example_inputs(component.tensors, manifest.model, 2)))
finally:
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    print("unpickled", unpickled)
    print("run", sorted({line[5] for line in maps if len(line) > 5 and str(folder) in line[5] and "x" in line[1]}))
"""


class Hostile:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self._marker),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "bundle"
    manifest = make_real_bundle(path)
    components = {
        name: msgspec.structs.replace(component, engine="torch") for name, component in manifest.components.items()
    }
    write_manifest(path, msgspec.structs.replace(manifest, components=components))
    return path


def package(data: bytes) -> bytes:
    """As PyTorch packs a program, with `data` for all that it would unpickle or map."""
    names = (
        "data/aotinductor/model/model.so",
        "data/weights/weight_0",
        "models/model.json",
        "data.pkl",
        "archive/data.pkl",
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, data)
    return buffer.getvalue()


def plant(folder: Path, marker: Path) -> None:
    """Beside the component's graph, by every name that PyTorch or we might take."""
    pickled = pickle.dumps(Hostile(marker))
    beside = folder / UNET
    for name in (
        "model.pt",
        "model.pt2",
        "model.onnx.pt2",
        "model.onnx.data",
        "weights.pt",
        "model.ckpt",
        "pytorch_model.bin",
    ):
        (beside / name).write_bytes(package(pickled) if name.endswith("pt2") else pickled)
    component = read_manifest(folder).components[UNET]
    # An entry of the cache by the very name that it would have.
    cache = CompiledCache(beside / "model.onnx", component, "any", {})
    entry = beside / cache._name
    for planted in (entry, beside / "inductor", beside / "native", beside / "torchinductor_root"):
        planted.mkdir()
        (planted / "model.pt2").write_bytes(package(pickled))
        (planted / "model.so").write_bytes(b"\x7fELF")
        (planted / "samples.json").write_bytes(msgspec.json.encode(compiled_cache._samples(planted)))
    assert list(cache.entries()) == []
    assert compiled_beside(beside / "model.onnx", component) == []  # so nobody copies it either


def run(folder: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR")
    arguments = [sys.executable, "-c", _PROGRAM, str(folder), UNET]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, cwd=folder / UNET)


def test_nothing_beside_a_model_is_unpickled_or_run(folder: Path, tmp_path: Path) -> None:
    plant(folder, tmp_path / "marker")
    ended = run(folder, tmp_path / "cache")
    assert ended.stdout.splitlines() == ["noise_pred", "unpickled []", "run []"], ended.stderr
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["weights.pt", "model.pt2"])
def test_a_pickle_or_a_program_of_pytorchs_own_in_the_place_of_the_graph(
    folder: Path, tmp_path: Path, name: str
) -> None:
    plant(folder, tmp_path / "marker")
    shutil.copyfile(folder / UNET / name, folder / UNET / "model.onnx")
    ended = run(folder, tmp_path / "cache")
    assert "BundleError" in ended.stderr
    assert ended.stdout.splitlines() == ["unpickled []", "run []"]
    assert not (tmp_path / "marker").exists()


def test_the_test_sees_what_is_unpickled(tmp_path: Path) -> None:
    (tmp_path / "pickle").write_bytes(pickle.dumps(Hostile(tmp_path / "marker")))
    program = (
        _PROGRAM.partition("from diffuserve")[0]
        + "import pickle; pickle.load(open(sys.argv[1], 'rb')); print(unpickled)"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path / "pickle")], capture_output=True, text=True)
    assert "mkdir" in ended.stdout
    assert (tmp_path / "marker").is_dir()


@pytest.mark.parametrize("state", ["open to all", "a link", "a file", "below a folder that is open to all"])
def test_a_cache_folder_that_others_can_write_to_is_not_used(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native = private_cache_folder()
    assert native is not None
    assert native == tmp_path / "cache" / "diffuserve" / "native"
    if state == "open to all":
        native.chmod(0o777)
    elif state == "below a folder that is open to all":
        native.parent.chmod(0o777)
    else:
        native.rmdir()
        if state == "a link":
            (tmp_path / "elsewhere").mkdir(mode=0o700)
            native.symlink_to(tmp_path / "elsewhere")
        else:
            native.touch()
    assert private_cache_folder() is None
    assert f"{native} " in caplog.text
    assert "so what PyTorch compiles is not kept" in caplog.text


def test_a_process_without_a_umask_makes_a_private_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = os.umask(0)
    try:
        assert private_cache_folder() == tmp_path / "cache" / "diffuserve" / "native"
    finally:
        os.umask(before)


def test_a_cache_folder_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert private_cache_folder() is None
    assert "Name a folder that this user may write to in $XDG_CACHE_HOME" in caplog.text


def test_a_folder_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert private_cache_folder() is not None
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    assert private_cache_folder() is None


def test_a_folder_below_another_users_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native = private_cache_folder()
    assert native is not None
    stat, uid = Path.stat, os.getuid()
    for owner, used in ((uid, True), (0, True), (uid + 1, False)):

        def of_owner(path: Path, owner: int = owner, **options: bool) -> os.stat_result:
            found = stat(path, **options)
            return os.stat_result((*found[:4], owner, *found[5:])) if path == native.parent else found

        monkeypatch.setattr(Path, "stat", of_owner)
        assert (private_cache_folder() == native) is used


def test_pytorchs_compiler_gets_a_folder_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffuserve.engines.torch_compiler import inductor_folder, scratch_folder

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    inductor_folder()
    own = str(tmp_path / "diffuserve" / "native" / "inductor")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == own
    with scratch_folder() as scratch:
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(scratch)
        assert scratch.stat().st_mode & 0o777 == 0o700
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == own
    assert not scratch.exists()
