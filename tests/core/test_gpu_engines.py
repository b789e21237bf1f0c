"""Engines on a GPU against ONNX Runtime on the CPU: every kind of batch, other sizes, and each call more than once, since later
ones use what earlier ones have left."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from diffuserve.bundle.manifest import Component, ModelSpec
from diffuserve.engines import load_engine
from diffuserve.engines.availability import availability
from diffuserve.engines.example_inputs import example_inputs
from diffuserve.engines.gpu import gpu_architectures
from diffuserve.engines.onnxruntime import OnnxRuntimeEngine
from diffuserve.engines.torch import TorchEngine
from diffuserve.limits import Limits
from diffuserve.stages import Engine
from diffuserve.trials.conversion import converted
from diffuserve.trials.selecting import select_engines
from diffuserve.trials.tolerance import tolerance_of
from tests.core.tiny_graphs import make_real_bundle

ROWS = (1, 2, 2, 3, 8, 9, 32, 33, 2, 1, 3)


def check(engine: Engine, reference: Engine, component: Component, model: ModelSpec) -> None:
    sizes = (
        model,
        msgspec.structs.replace(model, width=2 * model.width),
        msgspec.structs.replace(model, width=model.size_multiple, height=model.size_multiple),
        msgspec.structs.replace(model, max_tokens=2 * model.max_tokens)
        if component.tensors.inputs[0].name == "sample"
        else model,
    )
    for size in (*sizes, model):
        for rows in ROWS:
            inputs = example_inputs(component.tensors, size, rows)
            expected = reference(inputs)
            tolerance = tolerance_of(component.tensors, component.precision, expected)
            actual = engine(inputs)
            for name, array in expected.items():
                assert (actual[name].shape, actual[name].dtype) == (array.shape, array.dtype)
                error = np.abs(actual[name].astype(np.float64) - array).max()
                assert error <= tolerance, f"{rows} rows of {inputs[component.tensors.inputs[0].name].shape[1:]}"


def check_bundle(folder: Path, engine: str, precision: str) -> None:
    if any(not way.usable for way in availability() if (way.engine, way.precision) == (engine, precision)):
        pytest.skip("see diffuserve engines for what is missing")
    selected = select_engines(folder, engine, precision)
    for name, component in selected.components.items():
        loaded = load_engine(folder / component.files[0].path, component, threads=0)
        check(loaded, OnnxRuntimeEngine(folder / name / "model.onnx"), component, selected.model)


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu_architectures(), reason="needs an NVIDIA GPU"),
]
WAYS = [
    ("torch-cuda", "fp16"),
    ("torch-cuda", "bf16"),
    ("torch-cuda", "fp32"),
    ("onnxruntime-cuda", "fp16"),
    ("onnxruntime-cuda", "fp32"),
    ("tensorrt", "fp16"),
    ("tensorrt", "bf16"),
    ("tensorrt", "fp32"),
    ("tensorrt-rtx", "fp16"),
    ("tensorrt-rtx", "bf16"),
    ("tensorrt-rtx", "fp32"),
]


@pytest.mark.parametrize(("engine", "precision"), WAYS)
def test_the_small_model(tmp_path: Path, engine: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # which would take PyTorch a minute or two
    make_real_bundle(tmp_path)
    check_bundle(tmp_path, engine, precision)


@pytest.mark.slow  # TensorRT builds for minutes
@pytest.mark.parametrize(("engine", "precision"), WAYS)
def test_the_bundled_model(bundle: Path, tmp_path: Path, engine: str, precision: str) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    check_bundle(tmp_path / "bundle", engine, precision)


@pytest.mark.parametrize("compiles", ["ahead of time", pytest.param("at calls", marks=pytest.mark.slow), "not at all"])
def test_pytorch_compiled(tmp_path: Path, compiles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each way that a machine may allow; the second start loads what the first one has compiled."""
    if any(not way.usable for way in availability() if (way.engine, way.precision) == ("torch-cuda", "fp16")):
        pytest.skip("see diffuserve engines for what is missing")
    from diffuserve.engines import torch_program

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", str(int(compiles == "not at all")))
    if compiles == "at calls":
        monkeypatch.setattr(torch_program, "compiler_lacks", lambda device: "as this test has it")
    (tmp_path / "bundle").mkdir()
    manifest = make_real_bundle(tmp_path / "bundle")
    component = converted(
        tmp_path / "bundle",
        manifest.components["unet"],
        "torch-cuda",
        "fp16",
        manifest.model,
        Limits.for_model(manifest.model),
    )
    for _ in range(2):
        engine = load_engine(tmp_path / "bundle" / component.files[0].path, component, threads=0)
        check(engine, OnnxRuntimeEngine(tmp_path / "bundle" / "unet" / "model.onnx"), component, manifest.model)
    assert len(list(tmp_path.glob("cache/diffuserve/native/*.torch-cuda"))) == (compiles == "ahead of time")


def test_pytorch_takes_and_gives_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if any(not way.usable for way in availability() if (way.engine, way.precision) == ("torch-cuda", "fp16")):
        pytest.skip("see diffuserve engines for what is missing")
    import torch

    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    manifest = make_real_bundle(tmp_path)
    component = converted(
        tmp_path, manifest.components["unet"], "torch-cuda", "fp16", manifest.model, Limits.for_model(manifest.model)
    )
    engine = TorchEngine(tmp_path / component.files[0].path, component)
    for rows in ROWS:
        arrays = example_inputs(component.tensors, manifest.model, rows)
        outputs = engine({name: torch.from_numpy(array).to(engine.device) for name, array in arrays.items()})
        expected = engine(arrays)
        for name, tensor in outputs.items():
            assert tensor.device == engine.device
            np.testing.assert_allclose(tensor.cpu().numpy(), expected[name], atol=1e-2)
