"""What TensorRT is told about shapes, and which plans are refused. Building and running one takes a GPU."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from diffuserve.bundle import Manifest, read_manifest, verify
from diffuserve.engines import tensorrt_plan
from diffuserve.engines.availability import availability
from diffuserve.engines.example import native_dims
from diffuserve.engines.gpu import gpu_architectures
from diffuserve.engines.sixteen_bit import sixteen_bit_from_onnx
from diffuserve.engines.tensorrt_plan import check_plan, plan_path, profiles
from diffuserve.engines.trials import select_engines
from diffuserve.errors import BundleError
from diffuserve.request import Limits
from diffuserve.tensors import TEXT_ENCODER, UNET, stage_specs
from tests.core.fakes import MODEL
from tests.core.tiny_graphs import STAGES, make_real_bundle
from tests.graphs import check_profiles


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_real_bundle(tmp_path)


@pytest.mark.parametrize("stage", STAGES)
def test_the_graph_takes_every_profiles_shapes(manifest: Manifest, tmp_path: Path, stage: str) -> None:
    sixteen_bit_from_onnx(tmp_path / stage / "model.onnx", tmp_path / "narrow.onnx", "fp16")
    check_profiles(tmp_path / "narrow.onnx", manifest.components[stage].tensors, MODEL)


def test_profiles_hold_what_other_families_add() -> None:
    """Stable Diffusion XL's pooled text and image size, and LCM's guidance, have a batch and no other free dimension."""
    table = stage_specs(max_tokens=12, hidden_size=5, latent_channels=4, pooled_size=20, guidance_size=16)
    for profile in profiles(table[UNET], MODEL):
        for name, size in (("text_embeds", 20), ("time_ids", 6), ("timestep_cond", 16)):
            for selector in ("min", "opt", "max"):
                assert getattr(profile[name], selector) == (getattr(profile["sample"], selector)[0], size)
    for profile in profiles(table[TEXT_ENCODER], MODEL):
        assert profile["input_ids"] == profile["input_ids_2"]


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
    for precision, graph in (("fp16", "model.fp16.onnx"), ("bf16", "model.bf16.onnx"), ("fp32", "model.onnx")):
        path = plan_path(tmp_path / graph, precision)
        assert path == tmp_path / f"model.{precision}.sm90.trt11.4.1.plan"
        check_plan(path)
    for other in ("sm89.trt11.4.1", "sm90.trt10.13.0"):
        with pytest.raises(
            BundleError, match=rf"built for {other}, and this machine has sm90.trt11.4.1. Build it here: "
        ):
            check_plan(tmp_path / f"model.fp16.{other}.plan")


@pytest.mark.skipif(bool(gpu_architectures()), reason="this machine has a GPU")
def test_without_a_gpu(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="TensorRT needs an NVIDIA GPU"):
        plan_path(tmp_path / "model.fp16.onnx", "fp16")
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
        assert component.precision == precision
        check_plan(tmp_path / component.files[0].path)
    assert select_engines(tmp_path, "onnxruntime").all_files() == manifest.all_files()
    assert read_manifest(tmp_path).all_files() == manifest.all_files()
