"""What plans are called, and which are refused. Running one takes a GPU."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from diffuserve.bundle.checksums import verify
from diffuserve.bundle.manifest import Manifest, read_manifest
from diffuserve.engines import tensorrt_plan
from diffuserve.engines.availability import availability
from diffuserve.engines.gpu import gpu_architectures
from diffuserve.engines.tensorrt_library import LIBRARIES, TENSORRT, TENSORRT_RTX, Library
from diffuserve.engines.tensorrt_plan import check_plan, plan_architectures, plan_path
from diffuserve.engines.tensorrt_profiles import plan_limits
from diffuserve.errors import BundleError
from diffuserve.limits import Limits
from diffuserve.trials.conversion import is_made
from diffuserve.trials.selecting import select_engines
from tests.core.fake_tensorrt import fake_tensorrt
from tests.core.tiny_graphs import make_real_bundle

all_libraries = pytest.mark.parametrize("library", LIBRARIES.values(), ids=lambda library: library.engine)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_real_bundle(tmp_path)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("tensorrt", "11.4.1", portable=False))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_tensorrt("tensorrt_rtx", "1.7.1.116", portable=True))


def see(monkeypatch: pytest.MonkeyPatch, *architectures: str) -> None:
    """The GPUs that this machine has."""
    monkeypatch.setattr(tensorrt_plan, "gpu_architectures", lambda: architectures)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("library", "here", "others"),
    [
        (TENSORRT, "sm90.trt11.4.1", ("sm89.trt11.4.1", "sm90.trt10.13.0", "sm90.rtx11.4.1")),
        (TENSORRT_RTX, "sm90.rtx1.7.1.116", ("sm86-sm89.rtx1.7.1.116", "sm90.rtx1.7.1.117", "sm9-sm0.rtx1.7.1.116")),
    ],
)
def test_a_plan_is_named_after_what_it_was_built_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: Library, here: str, others: Sequence[str]
) -> None:
    see(monkeypatch, "sm90", "sm75")
    for precision, graph in (("fp16", "model.fp16.onnx"), ("bf16", "model.bf16.onnx"), ("fp32", "model.onnx")):
        path = plan_path(library, tmp_path / graph, precision, Limits(max_rows=64))
        assert path == tmp_path / f"model.{precision}.64x1024x3.{here}.plan"
        assert is_made(path.name)
        check_plan(library, path)
    for other in others:
        with pytest.raises(
            BundleError,
            match=f"built for {other}, and this machine has {here}. Build it here: .* --select {library.engine}",
        ):
            check_plan(library, tmp_path / f"model.fp16.32x1024x3.{other}.plan")


@pytest.mark.usefixtures("installed")
def test_a_plan_for_several_architectures_runs_on_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    graph = tmp_path / "model.fp16.onnx"
    see(monkeypatch)  # no GPU is asked for where architectures are named
    several = plan_path(TENSORRT_RTX, graph, "fp16", Limits(), ("sm86", "sm89"))
    assert several == tmp_path / "model.fp16.32x1024x3.sm86-sm89.rtx1.7.1.116.plan"
    assert plan_architectures(several) == ["sm86", "sm89"]
    for architecture in ("sm86", "sm89"):
        see(monkeypatch, architecture)
        check_plan(TENSORRT_RTX, several)
        assert plan_path(TENSORRT_RTX, graph, "fp16", Limits()) != several  # it is not there yet
    several.touch()
    for architecture in ("sm86", "sm89", "sm120"):
        see(monkeypatch, architecture)
        runs = architecture != "sm120"
        assert (plan_path(TENSORRT_RTX, graph, "fp16", Limits()) == several) == runs
        assert plan_path(TENSORRT_RTX, graph, "fp16", Limits(max_rows=64)) != several
        assert plan_path(TENSORRT_RTX, graph, "fp32", Limits()) != several
    see(monkeypatch, "sm89")
    for name in ("sm89.rtx1.7.1.115", "sm8.rtx1.7.1.116", "sm86-sm89-sm120.rtx1.7.1.116"):
        (tmp_path / f"model.fp16.32x1024x3.{name}.plan").touch()
    assert plan_path(TENSORRT_RTX, graph, "fp16", Limits()) == several
    own = plan_path(TENSORRT_RTX, graph, "fp16", Limits(), ("sm89",))
    own.touch()
    assert plan_path(TENSORRT_RTX, graph, "fp16", Limits()) == own


def test_architectures() -> None:
    assert TENSORRT_RTX.check_architectures(("sm120", "sm86", "sm120")) == ("sm86", "sm120")
    with pytest.raises(BundleError, match=r"TensorRT for RTX does not run on 'sm90', ''. It runs on: sm75, .*sm121\."):
        TENSORRT_RTX.check_architectures(("sm90", "sm89", ""))


@all_libraries
def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: Library) -> None:
    monkeypatch.setitem(sys.modules, library.module, None)  # as if it could not be found
    with pytest.raises(
        BundleError, match=rf"The engine {library.engine} is not installed. .*diffuserve\[{library.engine}\]"
    ):
        plan_path(library, tmp_path / "model.fp16.onnx", "fp16", Limits(), ("sm89",))


@pytest.mark.usefixtures("installed")
@pytest.mark.skipif(bool(gpu_architectures()), reason="this machine has a GPU")
@all_libraries
def test_without_a_gpu(manifest: Manifest, tmp_path: Path, library: Library) -> None:
    with pytest.raises(BundleError, match=f"{library.title} needs an NVIDIA GPU"):
        plan_path(library, tmp_path / "model.fp16.onnx", "fp16", Limits())
    with pytest.raises(BundleError, match=rf"{library.engine} in fp16 cannot run here: .*no NVIDIA GPU can be seen"):
        select_engines(tmp_path, library.engine)


@pytest.mark.gpu
@pytest.mark.skipif(not gpu_architectures(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@all_libraries
def test_on_a_gpu(manifest: Manifest, tmp_path: Path, precision: str, library: Library) -> None:
    if any(not way.usable for way in availability() if (way.engine, way.precision) == (library.engine, precision)):
        pytest.skip("see diffuserve engines for what is missing")
    selected = select_engines(tmp_path, library.engine, precision)
    verify(tmp_path, selected)
    assert all(not trial.rejected for trial in selected.trials)
    for component in selected.components.values():
        assert (component.precision, component.plan_limits) == (
            precision,
            plan_limits(Limits.for_model(selected.model)),
        )
        check_plan(library, tmp_path / component.files[0].path)
    assert select_engines(tmp_path, "onnxruntime").all_files() == manifest.all_files()
    assert read_manifest(tmp_path).all_files() == manifest.all_files()
