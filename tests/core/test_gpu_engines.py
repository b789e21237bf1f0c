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
from diffuserve.stages import Engine
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
def test_the_small_model(tmp_path: Path, engine: str, precision: str) -> None:
    make_real_bundle(tmp_path)
    check_bundle(tmp_path, engine, precision)


@pytest.mark.slow  # TensorRT builds for minutes
@pytest.mark.parametrize(("engine", "precision"), WAYS)
def test_the_bundled_model(bundle: Path, tmp_path: Path, engine: str, precision: str) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    check_bundle(tmp_path / "bundle", engine, precision)
