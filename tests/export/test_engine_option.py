"""`export --engine`: the same choice as `diffuserve engines`, on a bundle that has just been written or is up to date."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto

from diffuserve.bundle import read_manifest
from diffuserve.engines.example import example_inputs
from diffuserve.engines.half import half_from_onnx
from diffuserve.engines.onnxruntime import OnnxRuntimeEngine
from diffuserve.engines.tolerance import RELATIVE_TOLERANCE, TOLERANCE_LEVELS
from diffuserve.errors import BundleError
from diffuserve.tensors import STAGES
from diffuserve_export.cli import command


def test_an_unknown_engine_is_refused_before_anything_is_exported(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="There is no engine abacus"):
        CliRunner().invoke(
            command, ["no-checkpoint", "--output", str(tmp_path / "out"), "--engine", "abacus"], catch_exceptions=False
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", STAGES)
def test_exported_graphs_in_fp16(tiny_bundle: Path, tmp_path: Path, stage: str) -> None:
    manifest = read_manifest(tiny_bundle)
    component, path = manifest.components[stage], tiny_bundle / stage / "model.onnx"
    half_from_onnx(path, tmp_path / "half.onnx")
    model = onnx.load(tmp_path / "half.onnx")
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    types = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    assert TensorProto.DOUBLE not in types
    multiplied = {name for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul") for name in node.input}
    # The frequencies of the timestep's sines are multiplied in fp32.
    in_fp32 = [
        tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT and tensor.name in multiplied
    ]
    assert sum(int(np.prod(tensor.dims)) for tensor in in_fp32) < 100
    inputs = example_inputs(component.tensors, manifest.model, 2, {})
    [expected], [actual] = (OnnxRuntimeEngine(each)(inputs).values() for each in (path, tmp_path / "half.onnx"))
    error = np.abs(actual.astype(np.float64) - expected).max()
    assert (
        0
        < error
        <= (TOLERANCE_LEVELS["fp16"] if expected.dtype == np.uint8 else RELATIVE_TOLERANCE["fp16"] * expected.std())
    )


def test_a_bundle_that_is_up_to_date_changes_its_engine_only(
    tiny_bundle: Path, shared_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    arguments = [str(shared_checkpoint), "--output", str(bundle)]
    result = CliRunner().invoke(command, [*arguments, "--engine", "openvino"], catch_exceptions=False)
    assert "is up to date" in result.output
    assert "unet runs on openvino in fp32" in result.output
    selected = read_manifest(bundle)
    assert {component.engine for component in selected.components.values()} == {"openvino"}
    assert {trial.component for trial in selected.trials} == set(STAGES)
    assert selected.bundle_sha256 == read_manifest(tiny_bundle).bundle_sha256
    CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert read_manifest(bundle) == selected  # an export without --engine keeps it
