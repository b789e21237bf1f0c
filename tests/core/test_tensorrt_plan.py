"""What plans are called, and which are refused. Building and running one takes a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffuserve.bundle.checksums import verify
from diffuserve.bundle.manifest import Manifest, read_manifest
from diffuserve.engines import tensorrt_plan
from diffuserve.engines.availability import availability
from diffuserve.engines.gpu import gpu_architectures
from diffuserve.engines.tensorrt_plan import check_plan, plan_path
from diffuserve.engines.tensorrt_profiles import plan_limits
from diffuserve.errors import BundleError
from diffuserve.limits import Limits
from diffuserve.trials.conversion import is_made
from diffuserve.trials.selecting import select_engines
from tests.core.tiny_graphs import make_real_bundle


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_real_bundle(tmp_path)


def test_a_plan_is_named_after_what_it_was_built_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tensorrt_plan, "_this_machine", lambda: "sm90.trt11.4.1")
    for precision, graph in (("fp16", "model.fp16.onnx"), ("bf16", "model.bf16.onnx"), ("fp32", "model.onnx")):
        path = plan_path(tmp_path / graph, precision, Limits(max_rows=64))
        assert path == tmp_path / f"model.{precision}.64x1024x3.sm90.trt11.4.1.plan"
        assert is_made(path.name)
        check_plan(path)
    for other in ("sm89.trt11.4.1", "sm90.trt10.13.0"):
        with pytest.raises(
            BundleError, match=rf"built for {other}, and this machine has sm90.trt11.4.1. Build it here: "
        ):
            check_plan(tmp_path / f"model.fp16.32x1024x3.{other}.plan")


@pytest.mark.skipif(bool(gpu_architectures()), reason="this machine has a GPU")
def test_without_a_gpu(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="TensorRT needs an NVIDIA GPU"):
        plan_path(tmp_path / "model.fp16.onnx", "fp16", Limits())
    with pytest.raises(BundleError, match=r"tensorrt in fp16 cannot run here: .*no NVIDIA GPU can be seen"):
        select_engines(tmp_path, "tensorrt")


@pytest.mark.gpu
@pytest.mark.skipif(not gpu_architectures(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_on_a_gpu(manifest: Manifest, tmp_path: Path, precision: str) -> None:
    if any(not way.usable for way in availability() if (way.engine, way.precision) == ("tensorrt", precision)):
        pytest.skip("see diffuserve engines for what is missing")
    selected = select_engines(tmp_path, "tensorrt", precision)
    verify(tmp_path, selected)
    assert all(not trial.rejected for trial in selected.trials)
    for component in selected.components.values():
        assert (component.precision, component.plan_limits) == (
            precision,
            plan_limits(Limits.for_model(selected.model)),
        )
        check_plan(tmp_path / component.files[0].path)
    assert select_engines(tmp_path, "onnxruntime").all_files() == manifest.all_files()
    assert read_manifest(tmp_path).all_files() == manifest.all_files()
