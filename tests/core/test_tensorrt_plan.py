"""What TensorRT is told about shapes, and which plans are refused. Building and running one takes a GPU."""

from __future__ import annotations

from pathlib import Path

import msgspec
import onnx
import pytest

from diffuserve.bundle import Component, Manifest, read_manifest, verify
from diffuserve.engines import tensorrt_plan
from diffuserve.engines.example import native_dims
from diffuserve.engines.gpu import gpu_architectures
from diffuserve.engines.half import half_from_onnx
from diffuserve.engines.tensorrt_plan import check_plan, plan_path, profiles
from diffuserve.engines.trials import select_engines
from diffuserve.errors import BundleError
from diffuserve.request import Limits
from diffuserve.tensors import UNET
from tests.core.fakes import MODEL
from tests.core.tiny_graphs import STAGES, make_real_bundle


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_real_bundle(tmp_path)


def dims(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)


def inferred(path: Path, component: Component, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The output's shape for inputs of `shapes`, 0 where it is not known."""
    model = onnx.load(path)
    for value in model.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
            dim.dim_value = size
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    return dims(graph.output[0])


@pytest.mark.parametrize("stage", STAGES)
def test_the_graph_takes_every_profiles_shapes(manifest: Manifest, tmp_path: Path, stage: str) -> None:
    component = manifest.components[stage]
    half_from_onnx(tmp_path / stage / "model.onnx", tmp_path / "half.onnx")
    (output,) = component.tensors.outputs
    for profile in profiles(component.tensors, MODEL):
        for selector in ("min", "opt", "max"):
            shapes = {name: getattr(ranges, selector) for name, ranges in profile.items()}
            assert len({shape[0] for shape in shapes.values()}) == 1
            found = inferred(tmp_path / "half.onnx", component, shapes)
            assert found[0] == next(iter(shapes.values()))[0]
            assert all(found)
            assert all(size == dim for size, dim in zip(found[1:], output.dims, strict=True) if dim != -1)


@pytest.mark.parametrize("stage", STAGES)
def test_the_last_profile_takes_whatever_the_limits_allow(manifest: Manifest, stage: str) -> None:
    tensors = manifest.components[stage].tensors
    *static, dynamic = profiles(tensors, MODEL)
    limits = Limits.for_model(MODEL)
    for px in range(MODEL.size_multiple, limits.max_side_px + 1, MODEL.size_multiple):
        for spec in tensors.inputs:
            shape = native_dims(spec, msgspec.structs.replace(MODEL, width=px, height=px))
            ranges = dynamic[spec.name]
            assert all(
                low <= side <= high for low, side, high in zip(ranges.min[1:], shape, ranges.max[1:], strict=True)
            )
    for profile in static:
        for spec in tensors.inputs:
            ranges = profile[spec.name]
            assert ranges.min == ranges.opt == ranges.max
            assert ranges.opt[1:] == native_dims(spec, MODEL)
    assert [next(iter(profile.values())).opt[0] for profile in profiles(manifest.components[UNET].tensors, MODEL)[:-1]] == [
        1, 2, 4, 8, 16, 32
    ]  # fmt: skip


def test_a_plan_is_named_after_what_it_was_built_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tensorrt_plan, "_this_machine", lambda: "sm90.trt11.4.1")
    path = plan_path(tmp_path / "model.fp16.onnx")
    assert path == tmp_path / "model.fp16.sm90.trt11.4.1.plan"
    check_plan(path)
    for other in ("sm89.trt11.4.1", "sm90.trt10.13.0"):
        with pytest.raises(
            BundleError, match=rf"built for {other}, and this machine has sm90.trt11.4.1. Build it here: "
        ):
            check_plan(tmp_path / f"model.fp16.{other}.plan")


@pytest.mark.skipif(bool(gpu_architectures()), reason="this machine has a GPU")
def test_without_a_gpu(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="TensorRT needs an NVIDIA GPU"):
        plan_path(tmp_path / "model.fp16.onnx")
    with pytest.raises(BundleError, match=r"tensorrt in fp16 cannot run here: .*no NVIDIA GPU can be seen"):
        select_engines(tmp_path, "tensorrt")


@pytest.mark.gpu
@pytest.mark.skipif(not gpu_architectures(), reason="needs an NVIDIA GPU")
def test_on_a_gpu(manifest: Manifest, tmp_path: Path) -> None:
    selected = select_engines(tmp_path, "tensorrt")
    verify(tmp_path, selected)
    assert all(not trial.rejected for trial in selected.trials)
    for component in selected.components.values():
        check_plan(tmp_path / component.files[0].path)
    assert select_engines(tmp_path, "onnxruntime").all_files() == manifest.all_files()
    assert read_manifest(tmp_path).all_files() == manifest.all_files()
