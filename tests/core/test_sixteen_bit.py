"""fp32 graphs in 16 bits: ONNX Runtime runs fp16 on the CPU too, by casting back and forth, so its rounding shows here, and
`tests.graphs.run_rounded` does the same for bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, defs, numpy_helper

from diffuserve.engines.example_inputs import example_inputs
from diffuserve.engines.onnxruntime import OnnxRuntimeEngine
from diffuserve.errors import BundleError
from diffuserve.graphs.sixteen_bit import PRECISIONS, sixteen_bit_from_onnx
from diffuserve.tensors import STAGES, VAE_DECODER
from tests.core.tiny_graphs import make_real_bundle
from tests.graphs import rounded_to_bf16, run_rounded, value_types

TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
both = pytest.mark.parametrize("precision", PRECISIONS)


def convert(text: str, path: Path, precision: str, **weights: NDArray[Any]) -> onnx.ModelProto:
    """Writes the graph to model.onnx below `path`, and in 16 bits to narrow.onnx."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {text}')
    for name, array in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.save(model, path / "model.onnx")
    sixteen_bit_from_onnx(path / "model.onnx", path / "narrow.onnx", precision)
    return onnx.load(path / "narrow.onnx")


def run(path: Path, **inputs: NDArray[Any]) -> NDArray[Any]:
    """The first output."""
    return next(iter(OnnxRuntimeEngine(path)(inputs).values()))


def run_narrow(path: Path, precision: str, **inputs: NDArray[Any]) -> NDArray[Any]:
    if precision == "fp16":
        return run(path / "narrow.onnx", **inputs)
    return run_rounded(path / "narrow.onnx", inputs)[0]


@both
@pytest.mark.parametrize("stage", STAGES)
def test_it_stays_close_and_keeps_its_inputs_and_outputs(tmp_path: Path, stage: str, precision: str) -> None:
    manifest = make_real_bundle(tmp_path / "bundle")
    component, path = manifest.components[stage], tmp_path / "bundle" / stage / "model.onnx"
    sixteen_bit_from_onnx(path, tmp_path / "narrow.onnx", precision)
    inputs = example_inputs(component.tensors, manifest.model, 3, {})
    expected, actual = run(path, **inputs), run_narrow(tmp_path, precision, **inputs)
    assert actual.dtype == expected.dtype
    error = np.abs(actual.astype(np.float64) - expected).max()
    share = {"fp16": 0.01, "bf16": 0.05}[precision]
    assert 0 < error < (255 * share if expected.dtype == np.uint8 else share * expected.std())
    weights = [tensor for tensor in onnx.load(tmp_path / "narrow.onnx").graph.initializer if np.prod(tensor.dims) > 4]
    assert weights
    assert {tensor.data_type for tensor in weights} == {TYPES[precision]}


def test_bf16_weights_are_rounded_as_pytorch_rounds_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    numbers = (rng.standard_normal((64, 64)) * 10.0 ** rng.integers(-30, 30, (64, 64))).astype(np.float32)
    numbers[0, :6] = [0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1e-40, -1e-45]
    model = convert("g (float[B, 64] x) => (float[B, 64] y) { y = MatMul (x, w) }", tmp_path, "bf16", w=numbers)
    (weights,) = model.graph.initializer
    bits = np.frombuffer(weights.raw_data, "<u2").astype(np.uint32) << 16
    np.testing.assert_array_equal(bits.view(np.float32).reshape(64, 64), rounded_to_bf16(numbers))
    assert weights.data_type == TensorProto.BFLOAT16


def test_the_opset_of_bf16_changes_nothing_else(bundle: Path) -> None:
    """The converter raises the number and leaves the nodes."""
    operators = {node.op_type for stage in STAGES for node in onnx.load(bundle / stage / "model.onnx").graph.node}
    assert {"Conv", "InstanceNormalization", "Reshape"} <= operators
    for operator in operators:
        old, new = defs.get_schema(operator, 20), defs.get_schema(operator, 22)
        assert [each.name for each in old.inputs] == [each.name for each in new.inputs]
        assert [each.name for each in old.outputs] == [each.name for each in new.outputs]
        for name, attribute in new.attributes.items():
            assert attribute.default_value == old.attributes[name].default_value


@both
def test_angles_are_computed_in_fp32(tmp_path: Path, precision: str) -> None:
    model = convert(
        """embedding (float[B, 1] timestep) => (float[B, 3] out) {
            angle = MatMul (timestep, frequencies)
            sine = Sin (angle)
            out = MatMul (sine, weight)
        }""",
        tmp_path,
        precision,
        frequencies=np.array([[1.0, 0.5]], np.float32),
        weight=np.eye(2, 3, dtype=np.float32),
    )
    assert value_types(model)["sine"] == TensorProto.FLOAT
    timestep = np.array([[999.3]], np.float32)
    expected = np.sin(timestep @ np.array([[1.0, 0.5]]))
    # An angle in fp16 would be 999.5, and its sine wrong by a fifth.
    np.testing.assert_allclose(run_narrow(tmp_path, precision, timestep=timestep)[:, :2], expected, atol=4e-3)


@both
def test_an_image_is_rounded_in_fp32(tmp_path: Path, precision: str) -> None:
    model = convert(
        """decode (float[B, 3, h, w] latent) => (uint8[B, 3, h, w] image) {
            pixels = Conv (latent, weight)
            levels = Mul (pixels, scale)
            rounded = Round (levels)
            image = Cast <to = 2> (rounded)
        }""",
        tmp_path,
        precision,
        weight=np.eye(3, dtype=np.float32)[:, :, None, None],
        scale=np.array([255], np.float32),
    )
    assert value_types(model)["levels"] == TensorProto.FLOAT
    assert value_types(model)[f"pixels.{precision}"] == TYPES[precision]


@both
def test_whether_an_image_is_finite_is_told_of_what_16_bits_made(tmp_path: Path, precision: str) -> None:
    """In fp16 the second row overflows, and only there."""
    manifest = make_real_bundle(tmp_path / "bundle")
    latents = example_inputs(manifest.components[VAE_DECODER].tensors, manifest.model, 3)["latent_sample"]
    latents[1] *= 1e5
    path = tmp_path / "bundle" / VAE_DECODER / "model.onnx"
    sixteen_bit_from_onnx(path, tmp_path / "narrow.onnx", precision)
    assert OnnxRuntimeEngine(path)({"latent_sample": latents})["finite"].all()
    # Rounded after every operator, which ONNX Runtime's optimisations would leave out.
    _, finite = run_rounded(tmp_path / "narrow.onnx", {"latent_sample": latents})
    assert finite.tolist() == [[True], [precision == "bf16"], [True]]


@both
def test_normalisations_are_computed_in_fp32(tmp_path: Path, precision: str) -> None:
    """The variance of numbers around 300 would overflow fp16."""
    convert(
        """norm (float[B, 64] x) => (float[B, 64] out) {
            large = Mul (x, factor)
            out = LayerNormalization <axis = -1> (large, scale)
        }""",
        tmp_path,
        precision,
        factor=np.array([300], np.float32),
        scale=np.ones(64, np.float32),
    )
    x = np.random.default_rng(0).standard_normal((2, 64), dtype=np.float32)
    atol = {"fp16": 0.01, "bf16": 0.05}[precision]
    np.testing.assert_allclose(run_narrow(tmp_path, precision, x=x), run(tmp_path / "model.onnx", x=x), atol=atol)


@both
def test_masks_constants_and_values_that_are_used_in_both_precisions(tmp_path: Path, precision: str) -> None:
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
        precision,
        weight=3 * np.eye(4, dtype=np.float32),
    )
    assert value_types(model)["out"] == value_types(model)["y"] == TensorProto.FLOAT
    x = (np.arange(-10, 10, dtype=np.float32).reshape(5, 4) + 0.4) / 3  # y is far from where its whole part changes
    exact = OnnxRuntimeEngine(tmp_path / "model.onnx")({"x": x})
    if precision == "fp16":
        narrow = OnnxRuntimeEngine(tmp_path / "narrow.onnx")({"x": x})
    else:
        narrow = dict(zip(exact, run_rounded(tmp_path / "narrow.onnx", {"x": x}), strict=True))
    np.testing.assert_array_equal(narrow["whole"], exact["whole"])
    scale = {"fp16": 1, "bf16": 8}[precision]
    np.testing.assert_allclose(narrow["y"], exact["y"], atol=scale * 0.01)
    np.testing.assert_allclose(narrow["out"], exact["out"], atol=scale * 0.02)


def test_a_graph_with_branches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="has functions or branches"):
        convert(
            """branch (bool c, float[2] x) => (float[2] out) {
                out = If (c) <then_branch = then_g () => (float[2] a) { a = Neg (x) },
                              else_branch = else_g () => (float[2] b) { b = Abs (x) }>
            }""",
            tmp_path,
            "fp16",
        )
    assert not (tmp_path / "narrow.onnx").exists()
