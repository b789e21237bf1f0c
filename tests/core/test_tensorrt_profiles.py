"""The shapes that plans are built for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import onnx
import onnx.parser
import pytest

from diffuserve.bundle.manifest import Manifest
from diffuserve.engines.example_inputs import native_sizes
from diffuserve.engines.tensorrt_profiles import (
    Shapes,
    check_limits,
    has_one_size,
    most_rows,
    plan_limits,
    profile_for,
    profiles,
    profiles_of,
)
from diffuserve.errors import ConfigurationError, StageFailed
from diffuserve.graphs.sixteen_bit import PRECISIONS, sixteen_bit_from_onnx
from diffuserve.limits import PLAN_LIMITS, Limits
from diffuserve.tensors import (
    SAFETY_CHECKER,
    TEXT_ENCODER,
    UNET,
    VAE_DECODER,
    VAE_ENCODER,
    StageSpec,
    TensorSpec,
    stage_specs,
)
from tests.core.fakes import MODEL
from tests.core.tiny_graphs import STAGES, make_real_bundle
from tests.graphs import check_profiles

MOST_ROWS = {TEXT_ENCODER: 32, UNET: 32, VAE_DECODER: 8, VAE_ENCODER: 8, SAFETY_CHECKER: 8}


LIMITS = Limits.for_model(MODEL)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_real_bundle(tmp_path)


def with_plans(manifest: Manifest, built_for: dict[str, int], engine: str = "tensorrt") -> Manifest:
    components = {
        name: msgspec.structs.replace(component, engine=engine, plan_limits=built_for)
        for name, component in manifest.components.items()
    }
    return msgspec.structs.replace(manifest, components=components)


def shapes_of(tensors: StageSpec, rows: int, width: int, height: int, chunks: int = 1) -> Shapes:
    size = msgspec.structs.replace(MODEL, width=width, height=height, max_tokens=chunks * MODEL.max_tokens)
    return {spec.name: spec.shape(rows, native_sizes(size)) for spec in tensors.inputs}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_graph_takes_every_profiles_shapes(manifest: Manifest, tmp_path: Path, stage: str, precision: str) -> None:
    sixteen_bit_from_onnx(tmp_path / stage / "model.onnx", tmp_path / "narrow.onnx", precision)
    check_profiles(tmp_path / "narrow.onnx", manifest.components[stage].tensors, MODEL)


def test_a_graph_that_fixes_what_a_profile_leaves_free_is_noticed(tmp_path: Path) -> None:
    """As TensorRT notices it when it builds the plan."""
    graph = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[B, 12, 5] encoder_hidden_states) => (float[B, 12, 5] noise_pred)'
        "{ noise_pred = Neg (encoder_hidden_states) }"
    )
    onnx.save(graph, tmp_path / "model.onnx")
    unet = stage_specs(max_tokens=12, hidden_size=5, latent_channels=4)[UNET]
    tensors = StageSpec(unet.inputs[2:], (TensorSpec("noise_pred", "FP32", ("tokens", 5)),))
    with pytest.raises(AssertionError, match="encoder_hidden_states is 12 long in the graph, and is to be 36"):
        check_profiles(tmp_path / "model.onnx", tensors, MODEL)


def test_profiles_hold_what_other_families_add() -> None:
    """Stable Diffusion XL's pooled text and image size, and LCM's guidance, have a batch and no other free dimension."""
    table = stage_specs(max_tokens=12, hidden_size=5, latent_channels=4, pooled_size=20, guidance_size=16)
    for profile in profiles(table[UNET], MODEL, LIMITS):
        for name, size in (("text_embeds", 20), ("time_ids", 6), ("timestep_cond", 16)):
            for selector in ("min", "opt", "max"):
                assert getattr(profile[name], selector) == (getattr(profile["sample"], selector)[0], size)
    for profile in profiles(table[TEXT_ENCODER], MODEL, LIMITS):
        assert profile["input_ids"] == profile["input_ids_2"]


@pytest.mark.parametrize("stage", STAGES)
def test_few_profiles_for_the_native_size(manifest: Manifest, stage: str) -> None:
    tensors = manifest.components[stage].tensors
    found = profiles(tensors, MODEL, LIMITS)
    rows = [next(iter(profile.values())) for profile in found]
    batches = [(ranges.min[0], ranges.opt[0], ranges.max[0]) for ranges in rows]
    native = [(1, 2, 2), (3, 8, 8), (9, 32, 32)][: 3 if MOST_ROWS[stage] == 32 else 2]
    assert batches[: len(native)] == native
    assert [has_one_size(profile) for profile in found] == [True] * len(native) + [False] * (len(found) - len(native))
    # Nothing else is left to allow where only the batch is free.
    assert len(found) - len(native) == (0 if stage in (TEXT_ENCODER, SAFETY_CHECKER) else 1)


@pytest.mark.parametrize("stage", STAGES)
def test_whatever_the_limits_allow_has_a_profile(manifest: Manifest, stage: str) -> None:
    tensors = manifest.components[stage].tensors
    found = profiles(tensors, MODEL, LIMITS)
    sides = range(MODEL.size_multiple, LIMITS.max_side_px + 1, MODEL.size_multiple)
    for width in sides:
        for height in sides:
            for chunks in range(1, LIMITS.max_prompt_chunks + 1):
                shapes = shapes_of(tensors, 1, width, height, chunks)
                rows = most_rows(found, shapes)
                for count in (1, rows):
                    assert profile_for(found, shapes_of(tensors, count, width, height, chunks)) < len(found)
                native = shapes == shapes_of(tensors, 1, MODEL.width, MODEL.height)
                assert rows == MOST_ROWS[stage] if native else rows < MOST_ROWS[stage]


@pytest.mark.parametrize("stage", STAGES)
def test_no_profile_allows_more_than_the_largest_batch_of_the_native_size(manifest: Manifest, stage: str) -> None:
    tensors = manifest.components[stage].tensors
    for profile in profiles(tensors, MODEL, LIMITS):
        for spec in tensors.inputs:
            if {"height", "latent_height"} & {*spec.dims}:  # latents and images
                largest = profile[spec.name].max
                native = spec.shape(MOST_ROWS[stage], native_sizes(MODEL))
                volume = [1, 1]
                for number, shape in enumerate((largest, native)):
                    for side in shape:
                        volume[number] *= side
                assert volume[0] <= volume[1]


def test_shapes_beyond_the_limits_have_none() -> None:
    tensors = stage_specs(max_tokens=12, hidden_size=5, latent_channels=4)[UNET]
    found = profiles(tensors, MODEL, LIMITS)
    inputs = {spec.name: spec for spec in tensors.inputs}
    for changed in ({"width": 144}, {"height": 8}, {"chunks": 4}):
        shapes = shapes_of(tensors, 2, **{"width": 64, "height": 48, **changed})
        with pytest.raises(StageFailed, match="The plan was not built for inputs of the shapes"):
            most_rows(found, shapes)
        with pytest.raises(StageFailed, match="The plan was not built for inputs of the shapes"):
            profile_for(found, shapes)
    with pytest.raises(StageFailed, match="The plan was not built"):
        profile_for(found, shapes_of(tensors, 33, 64, 48))
    with pytest.raises(StageFailed, match="The plan was not built"):
        profile_for(found, dict.fromkeys(inputs, (2, 4)))


@pytest.mark.parametrize("limit", PLAN_LIMITS)
def test_limits_beyond_what_plans_are_built_for_are_refused(manifest: Manifest, limit: str) -> None:
    raised, lower = getattr(LIMITS, limit) + 16, getattr(LIMITS, limit) - 1
    more = replace(LIMITS, **{limit: raised})
    check_limits(more, manifest)  # runs no plan
    plans = with_plans(manifest, {})
    check_limits(replace(LIMITS, max_steps=1000, **{limit: lower}), plans)
    with pytest.raises(
        ConfigurationError, match=rf"{limit} is {raised}, .* --select tensorrt --limit {limit}={raised}, "
    ):
        check_limits(more, plans)
    check_limits(more, with_plans(manifest, {limit: raised}))
    with pytest.raises(
        ConfigurationError, match=f"The limit {limit} is {raised}, and TensorRT's plan of .* at most {lower}."
    ):
        check_limits(more, with_plans(manifest, {limit: lower}))
    with pytest.raises(
        ConfigurationError, match=f"TensorRT for RTX's plan of .* --select tensorrt-rtx --limit {limit}={raised}, "
    ):
        check_limits(more, with_plans(manifest, {limit: lower}, "tensorrt-rtx"))


def test_profiles_follow_from_the_limits(manifest: Manifest) -> None:
    limits = replace(LIMITS, max_rows=64, max_side_px=256, max_prompt_chunks=5)
    assert plan_limits(limits) == {"max_rows": 64, "max_side_px": 256, "max_prompt_chunks": 5}
    component = with_plans(manifest, plan_limits(limits)).components[UNET]
    found = profiles_of(component, MODEL)
    assert found == profiles(component.tensors, MODEL, limits) != profiles_of(manifest.components[UNET], MODEL)
    *native, other = [profile["sample"] for profile in found]
    assert [ranges.max[0] for ranges in native] == [2, 8, 32, 64]
    assert other.max[2:] == (32, 32)
    assert most_rows(found, shapes_of(component.tensors, 1, MODEL.width, MODEL.height)) == 64
    assert profile_for(found, shapes_of(component.tensors, 1, 256, 256, chunks=5)) == len(native)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("max_side_px", [16, 32, 40, 48, 63, 64])
def test_limits_below_the_native_size_give_profiles_that_can_be_built(
    manifest: Manifest, stage: str, max_side_px: int
) -> None:
    tensors = manifest.components[stage].tensors
    found = profiles(tensors, MODEL, replace(LIMITS, max_side_px=max_side_px))
    for profile in found:
        for ranges in profile.values():
            pairs = [*zip(ranges.min, ranges.opt, strict=True), *zip(ranges.opt, ranges.max, strict=True)]
            assert all(low <= high for low, high in pairs), ranges
            assert ranges.max[0] <= MOST_ROWS[stage]
    # The engine trials run at the native size, whatever servers will be asked for.
    for rows, width, height in ((MOST_ROWS[stage], MODEL.width, MODEL.height), (1, 16, 16)):
        assert profile_for(found, shapes_of(tensors, rows, width, height)) < len(found)
