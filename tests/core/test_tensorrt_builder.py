"""What is asked of a library that builds a plan, and what is said when it refuses; the library is none."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from diffuserve.engines import tensorrt_plan
from diffuserve.engines.tensorrt_builder import build_plan, serialized_plan
from diffuserve.engines.tensorrt_library import LIBRARIES, TENSORRT, TENSORRT_RTX, Library
from diffuserve.engines.tensorrt_profiles import ShapeRange, profiles
from diffuserve.errors import BundleError
from diffuserve.limits import Limits
from diffuserve.tensors import UNET, stage_specs
from tests.core.fake_tensorrt import ComputeCapability, fake_tensorrt
from tests.core.fakes import MODEL

TENSORS = stage_specs(max_tokens=12, hidden_size=5, latent_channels=4)[UNET]
LIMITS = Limits.for_model(MODEL)
PROFILES = profiles(TENSORS, MODEL, LIMITS)

all_libraries = pytest.mark.parametrize("library", LIBRARIES.values(), ids=lambda library: library.engine)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / UNET / "model.fp16.onnx"
    path.parent.mkdir()
    path.touch()
    return path


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, library: Library) -> Any:
    module = fake_tensorrt(library.module, "4.2", portable=library is TENSORRT_RTX)
    monkeypatch.setitem(sys.modules, library.module, module)
    monkeypatch.setattr(tensorrt_plan, "gpu_architectures", lambda: ("sm89",))
    return module


def build(library: Library, graph: Path, *architectures: str) -> Path:
    return build_plan(library, graph, "fp16", TENSORS, MODEL, LIMITS, architectures)


@all_libraries
def test_a_plan_has_the_profiles_and_no_tf32(library: Library, fake: Any, graph: Path) -> None:
    path = build(library, graph)
    assert path.name == f"model.fp16.32x128x3.sm89.{library.tag}4.2.plan"
    (config,) = fake.configs
    assert config.flags_cleared == [fake.BuilderFlag.TF32]
    assert config.profiles == [
        {name: (shapes.min, shapes.opt, shapes.max) for name, shapes in profile.items()} for profile in PROFILES
    ]
    assert json.loads(path.read_bytes())["tensors"] == [spec.name for spec in TENSORS.inputs]
    assert build(library, graph) == path
    assert len(fake.configs) == 1  # it was there


@pytest.mark.parametrize("library", [TENSORRT_RTX])
def test_rtx_builds_for_the_architectures_named(library: Library, fake: Any, graph: Path) -> None:
    both = build(library, graph, "sm86", "sm89")
    assert both.name == "model.fp16.32x128x3.sm86-sm89.rtx4.2.plan"
    assert build(library, graph) == both  # this machine's GPU is among them
    assert build(library, graph, "sm89") != both
    assert [config.capabilities for config in fake.configs] == [
        {0: ComputeCapability.SM86, 1: ComputeCapability.SM89},
        {0: ComputeCapability.SM89},
    ]
    with pytest.raises(BundleError, match=r"TensorRT for RTX of this version \(rtx4.2\) does not build for sm120\."):
        build(library, graph, "sm89", "sm120")
    assert {path.name.split(".")[-1] for path in graph.parent.parent.rglob("*.*")} == {"onnx", "plan"}


@pytest.mark.parametrize("library", [TENSORRT])
def test_tensorrts_measurements_are_kept_from_plan_to_plan(library: Library, fake: Any, graph: Path) -> None:
    timings = graph.parent.parent / "sm89.trt4.2.timings"
    build(library, graph)
    assert timings.read_bytes() == b"+"
    build_plan(library, graph, "bf16", TENSORS, MODEL, LIMITS)
    assert timings.read_bytes() == b"++"
    timings.write_bytes(b"of another driver")
    build_plan(library, graph, "fp32", TENSORS, MODEL, LIMITS)
    assert timings.read_bytes() == b"+"


@all_libraries
def test_what_is_refused_says_why(library: Library, fake: Any, graph: Path, caplog: pytest.LogCaptureFixture) -> None:
    fake.refuses = "graph"
    with pytest.raises(
        BundleError, match=rf"{library.title} cannot read .*onnx: In node 3 \(abacus\): UNSUPPORTED_NODE"
    ):
        build(library, graph)
    fake.refuses = "build"
    for _ in range(2):  # what was said of an earlier failure is not said again
        with pytest.raises(BundleError, match=rf"{library.title} cannot build .*onnx: reason 0; reason 1; reason 2$"):
            build(library, graph)
    assert {record.getMessage() for record in caplog.records} == {f"{fake.__name__}: reason {at}" for at in range(9)}
    fake.refuses = ""
    backwards = [{"sample": ShapeRange((2,), (1,), (1,))}]
    with pytest.raises(BundleError, match=rf"{library.title} refuses the shapes .*sample.* for .*model.fp16.onnx\."):
        serialized_plan(library, graph, backwards, ["sm89"])
    assert not [*graph.parent.glob("*.plan")]
