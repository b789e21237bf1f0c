"""fp32 graphs in fp16: ONNX Runtime runs them on the CPU too, by casting back and forth, so their rounding shows here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from diffuserve.engines.example import example_inputs
from diffuserve.engines.half import half_from_onnx
from diffuserve.engines.onnxruntime import OnnxRuntimeEngine
from diffuserve.errors import BundleError
from tests.core.tiny_graphs import STAGES, make_real_bundle


def convert(text: str, path: Path, **weights: NDArray[Any]) -> onnx.ModelProto:
    """Writes the graph to model.onnx below `path` and its half to half.onnx."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {text}')
    for name, array in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.save(model, path / "model.onnx")
    half_from_onnx(path / "model.onnx", path / "half.onnx")
    return onnx.load(path / "half.onnx")


def types(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    values = (*graph.input, *graph.output, *graph.value_info)
    return {value.name: value.type.tensor_type.elem_type for value in values}


def run(path: Path, **inputs: NDArray[Any]) -> NDArray[Any]:
    (output,) = OnnxRuntimeEngine(path)(inputs).values()
    return output


@pytest.mark.parametrize("stage", STAGES)
def test_it_stays_within_a_percent_and_keeps_its_inputs_and_outputs(tmp_path: Path, stage: str) -> None:
    manifest = make_real_bundle(tmp_path / "bundle")
    component, path = manifest.components[stage], tmp_path / "bundle" / stage / "model.onnx"
    half_from_onnx(path, tmp_path / "half.onnx")
    inputs = example_inputs(component.tensors, manifest.model, 3, {})
    expected, actual = run(path, **inputs), run(tmp_path / "half.onnx", **inputs)
    assert actual.dtype == expected.dtype
    error = np.abs(actual.astype(np.float64) - expected).max()
    assert error < (2 if expected.dtype == np.uint8 else 0.01 * expected.std())
    weights = [tensor for tensor in onnx.load(tmp_path / "half.onnx").graph.initializer if np.prod(tensor.dims) > 4]
    assert weights
    assert {tensor.data_type for tensor in weights} == {TensorProto.FLOAT16}


def test_angles_are_computed_in_fp32(tmp_path: Path) -> None:
    model = convert(
        """embedding (float[B, 1] timestep) => (float[B, 3] out) {
            angle = MatMul (timestep, frequencies)
            sine = Sin (angle)
            out = MatMul (sine, weight)
        }""",
        tmp_path,
        frequencies=np.array([[1.0, 0.5]], np.float32),
        weight=np.eye(2, 3, dtype=np.float32),
    )
    assert types(model)["sine"] == TensorProto.FLOAT
    timestep = np.array([[999.3]], np.float32)
    expected = np.sin(timestep @ np.array([[1.0, 0.5]]))
    # An angle in fp16 would be 999.5, and its sine wrong by a fifth.
    np.testing.assert_allclose(run(tmp_path / "half.onnx", timestep=timestep)[:, :2], expected, atol=1e-3)


def test_an_image_is_rounded_in_fp32(tmp_path: Path) -> None:
    model = convert(
        """decode (float[B, 3, h, w] latent) => (uint8[B, 3, h, w] image) {
            pixels = Conv (latent, weight)
            levels = Mul (pixels, scale)
            rounded = Round (levels)
            image = Cast <to = 2> (rounded)
        }""",
        tmp_path,
        weight=np.eye(3, dtype=np.float32)[:, :, None, None],
        scale=np.array([255], np.float32),
    )
    assert types(model)["levels"] == TensorProto.FLOAT
    assert types(model)["pixels.half"] == TensorProto.FLOAT16


def test_normalisations_are_computed_in_fp32(tmp_path: Path) -> None:
    """The variance of numbers around 300 would overflow fp16."""
    convert(
        """norm (float[B, 64] x) => (float[B, 64] out) {
            large = Mul (x, factor)
            out = LayerNormalization <axis = -1> (large, scale)
        }""",
        tmp_path,
        factor=np.array([300], np.float32),
        scale=np.ones(64, np.float32),
    )
    x = np.random.default_rng(0).standard_normal((2, 64), dtype=np.float32)
    np.testing.assert_allclose(run(tmp_path / "half.onnx", x=x), run(tmp_path / "model.onnx", x=x), atol=0.01)


def test_masks_constants_and_values_that_are_used_in_both_precisions(tmp_path: Path) -> None:
    model = convert(
        """both (float[B, 4] x) => (float[B, 4] out, float[B, 4] y, int64[B, 4] whole) {
            lowest = Constant <value = float[4] {0.0, -3.4e38, 0.0, -3.4e38}> ()
            y = MatMul (x, weight)
            whole = Cast <to = 7> (y)
            number = Cast <to = 1> (whole)
            sine = Sin (number)
            masked = Add (y, lowest)
            weights = Softmax (masked)
            sum = Add (weights, sine)
            again = Add (sum, number)
            out = Add (again, y)
        }""",
        tmp_path,
        weight=3 * np.eye(4, dtype=np.float32),
    )
    assert types(model)["out"] == types(model)["y"] == TensorProto.FLOAT
    x = np.random.default_rng(0).standard_normal((5, 4), dtype=np.float32)
    half, single = (OnnxRuntimeEngine(tmp_path / name)({"x": x}) for name in ("half.onnx", "model.onnx"))
    np.testing.assert_array_equal(half["whole"], single["whole"])
    np.testing.assert_allclose(half["y"], single["y"], atol=0.01)
    np.testing.assert_allclose(half["out"], single["out"], atol=0.02)


def test_bytes_are_cast_before_anything_else(tmp_path: Path) -> None:
    model = convert(
        """encode (uint8[B, h, w, 3] image) => (float[B, 3, h, w] latent) {
            pixels = Transpose <perm = [0, 3, 1, 2]> (image)
            numbers = Cast <to = 1> (pixels)
            latent = Conv (numbers, weight)
        }""",
        tmp_path,
        weight=np.eye(3, dtype=np.float32)[:, :, None, None],
    )
    assert [node.op_type for node in model.graph.node][:2] == ["Cast", "Transpose"]
    image = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 3), dtype=np.uint8)
    np.testing.assert_array_equal(run(tmp_path / "half.onnx", image=image), image.transpose(0, 3, 1, 2))


def test_a_graph_with_branches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="has functions or branches"):
        convert(
            """branch (bool c, float[2] x) => (float[2] out) {
                out = If (c) <then_branch = then_g () => (float[2] a) { a = Neg (x) },
                              else_branch = else_g () => (float[2] b) { b = Abs (x) }>
            }""",
            tmp_path,
        )
    assert not (tmp_path / "half.onnx").exists()
