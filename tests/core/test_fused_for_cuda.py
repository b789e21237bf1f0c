"""Graphs as ONNX Runtime gets them for a GPU. A CPU has no kernels for what they are made of, so it runs them spelt out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from diffuserve.bundle.manifest import read_manifest
from diffuserve.engines.example_inputs import example_inputs
from diffuserve.engines.onnxruntime import session_options
from diffuserve.graphs.fused_for_cuda import fuse_for_cuda
from diffuserve.graphs.sixteen_bit import sixteen_bit_from_onnx
from diffuserve.tensors import STAGES, TEXT_ENCODER, UNET
from tests.contrib import spelt_out
from tests.families import Family

CPU = ["CPUExecutionProvider"]


def run(model: onnx.ModelProto, inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options(0), providers=CPU)
    outputs: list[NDArray[Any]] = session.run(None, inputs)
    return outputs


def fused(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    fuse_for_cuda(copy)
    return copy


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def turned_round(model: onnx.ModelProto) -> list[str]:
    """The values that are turned round, but for weights, which ONNX Runtime turns when it loads them."""
    weights = {tensor.name for tensor in model.graph.initializer}
    perms = {
        node.input[0]: list(node.attribute[0].ints)
        for node in model.graph.node
        if node.op_type == "Transpose" and node.input[0] not in weights
    }
    return [name for name, perm in perms.items() if perm in ([0, 2, 3, 1], [0, 3, 1, 2])]


def error(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest, of numbers as a share of their deviation."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    scale = float(expected.std()) if expected.dtype == np.float32 else 1.0
    return float(np.abs(actual.astype(np.float64) - expected).max()) / scale


def check(bundle: Path, folder: Path, stage: str) -> onnx.ModelProto:
    """Compares what a stage's fused graphs compute with the exported one. Returns the fused graph in fp16."""
    manifest, path = read_manifest(bundle), bundle / stage / "model.onnx"
    tensors, model = manifest.components[stage].tensors, manifest.model
    exported = onnx.load(path)
    sixteen_bit_from_onnx(path, folder / "narrow.onnx", "fp16")
    narrow = fused(onnx.load(folder / "narrow.onnx"))
    fused_exported, spelt_narrow = spelt_out(fused(exported)), spelt_out(narrow)
    wide = msgspec.structs.replace(model, width=model.width + model.size_multiple, height=model.size_multiple)
    for size, rows in ((model, 1), (wide, 3)):
        inputs = example_inputs(tensors, size, rows)
        expected = run(exported, inputs)
        for reference, single, half in zip(
            expected, run(fused_exported, inputs), run(spelt_narrow, inputs), strict=True
        ):
            is_image = reference.dtype == np.uint8
            assert error(single, reference) <= (1 if is_image else 2e-5)
            assert error(half, reference) <= (2 if is_image else 0.015)
    return narrow


@pytest.mark.parametrize("stage", STAGES)
def test_the_bundled_model(bundle: Path, tmp_path: Path, stage: str) -> None:
    exported = operators(onnx.load(bundle / stage / "model.onnx"))
    made = check(bundle, tmp_path, stage)
    assert "InstanceNormalization" not in operators(made)
    assert "Conv" not in operators(made)
    for operator, was in (("GroupNorm", "InstanceNormalization"), ("NhwcConv", "Conv")):
        assert operators(made).count(operator) == exported.count(was)
        assert (exported.count(was) > 0) == (stage != TEXT_ENCODER)
    # Latents come and go with their channels first; images have them last.
    assert len(turned_round(made)) == {UNET: 2, TEXT_ENCODER: 0}.get(stage, 1)


@pytest.mark.parametrize("stage", STAGES)
def test_each_family(family: Family, tmp_path: Path, stage: str) -> None:
    made = check(family.bundle, tmp_path, stage)
    assert "Conv" not in operators(made)
    if stage == UNET:
        assert "InstanceNormalization" not in operators(made)
        assert len(turned_round(made)) == 2


@pytest.mark.parametrize("stage", [UNET, "vae_decoder"])
def test_onnx_runtime_knows_what_is_made(bundle: Path, stage: str) -> None:
    """It checks inputs, types and attributes of every node before it looks for kernels."""
    model = fused(onnx.load(bundle / stage / "model.onnx"))
    options = session_options(0)
    options.log_severity_level = 4
    with pytest.raises(
        Exception, match=r"NOT_IMPLEMENTED : .* (NhwcConv|GroupNorm)|NOT_IMPLEMENTED : .*com\.microsoft\."
    ):
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=CPU)
    node = next(node for node in model.graph.node if node.op_type == "GroupNorm")
    node.attribute.append(onnx.helper.make_attribute("groupings", 1))
    with pytest.raises(Exception, match="INVALID_GRAPH"):
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=CPU)


def test_weights_in_another_file(bundle: Path, tmp_path: Path) -> None:
    """As of models beyond 2 GB: what is made of them is computed when ONNX Runtime loads the graph."""
    manifest = read_manifest(bundle)
    model = onnx.load(bundle / UNET / "model.onnx")
    inputs = example_inputs(manifest.components[UNET].tensors, manifest.model, 2)
    (expected,) = run(model, inputs)
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="data", size_threshold=1024)
    options = session_options(0)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(tmp_path))
    apart = spelt_out(fused(onnx.load(tmp_path / "model.onnx", load_external_data=False)))
    assert len(apart.SerializeToString()) < 1 << 20
    session = onnxruntime.InferenceSession(apart.SerializeToString(), options, providers=CPU)
    (actual,) = session.run(None, inputs)
    assert error(actual, expected) <= 2e-5


def graph(text: str, **weights: tuple[int, ...]) -> onnx.ModelProto:
    """With random weights of these shapes; "ones" and "zeros" in a name are taken at their word."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {text}')
    rng = np.random.default_rng(3)
    for name, shape in weights.items():
        array = rng.standard_normal(shape).astype(np.float32)
        if name in ("ones", "zeros"):
            array[:] = name == "ones"
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.checker.check_model(model, full_check=True)
    return model


def check_text(model: onnx.ModelProto, **shapes: tuple[int, ...]) -> onnx.ModelProto:
    """Compares a graph with the fused one on random inputs. Returns the fused one."""
    rng = np.random.default_rng(5)
    inputs = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    made = fused(model)
    for actual, expected in zip(run(spelt_out(made), inputs), run(model, inputs), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-5)
    return made


NORM = """
    split = Constant <value = int64[3] {{0, 4, -1}}> ()
    groups = Reshape (x, split)
    normalised = InstanceNormalization <epsilon = 0.001> (groups, ones, zeros)
    sizes = Shape {shape} (x)
    joined = Reshape (normalised, sizes)
    scaled = Mul (joined, gamma)
    y = Add (scaled, beta)
    {after}
"""


def norm(
    after: str, output: str = "z", shape: str = "", channels: int = 16, more: str = "", **weights: Any
) -> onnx.ModelProto:
    body = NORM.format(shape=shape, after=after)
    shapes = {"ones": (4,), "zeros": (4,), "gamma": (channels, 1, 1), "beta": (channels, 1, 1), **weights}
    return graph(f"g (float[B, {channels}, h, w] x) => (float[B, C, H, W] {output}{more}) {{ {body} }}", **shapes)


def attributes(model: onnx.ModelProto) -> dict[str, Any]:
    (node,) = [node for node in model.graph.node if node.op_type == "GroupNorm"]
    return {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}


def test_a_normalisation_with_and_without_silu() -> None:
    silu = check_text(norm("s = Sigmoid (y) z = Mul (y, s)"), x=(2, 16, 3, 5))
    assert attributes(silu) == {
        "groups": 4,
        "epsilon": pytest.approx(0.001),
        "activation": 1,
        "channels_last": 1,
    }
    assert "Sigmoid" not in operators(silu)
    other_way_round = check_text(norm("s = Sigmoid (y) z = Mul (s, y)"), x=(2, 16, 3, 5))
    assert attributes(other_way_round)["activation"] == 1
    plain = check_text(norm("z = Relu (y)"), x=(1, 16, 4, 4))
    assert attributes(plain)["activation"] == 0
    assert operators(plain).count("Relu") == 1


@pytest.mark.parametrize(
    "after",
    [
        "s = Sigmoid (y) p = Mul (y, s) z = Add (p, y)",  # y is used once more
        "s = Sigmoid (y) z = Mul (s, x)",  # another product
        "s = Sigmoid (y) t = Neg (s) z = Mul (y, t)",
        "s = Sigmoid (y) p = Mul (s, x) q = Mul (y, x) z = Add (p, q)",
    ],
)
def test_what_is_no_silu_is_left_beside_the_normalisation(after: str) -> None:
    made = check_text(norm(after), x=(2, 16, 3, 5))
    assert attributes(made)["activation"] == 0
    assert "Sigmoid" in operators(made)


def test_a_normalisation_that_is_an_output_itself() -> None:
    made = check_text(norm("s = Sigmoid (y) z = Mul (y, s)", more=", float[B, C, H, W] y"), x=(2, 16, 3, 5))
    assert attributes(made)["activation"] == 0


@pytest.mark.parametrize(
    "model",
    [
        norm("z = Relu (y)", channels=12),  # three channels to a group, and the kernel takes two at a time
        norm("z = Relu (y)", gamma=(16, 3, 5), beta=(16, 3, 5)),
        norm("z = Relu (y)", gamma=(1, 16, 1, 1), beta=(1, 16, 1, 1)),
        norm("z = Add (y, joined)"),
    ],
    ids=["odd groups", "scales of pixels", "scales of four dimensions", "used in between"],
)
def test_other_normalisations_are_left_alone(model: onnx.ModelProto) -> None:
    channels = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    made = check_text(model, x=(2, channels, 3, 5))
    assert "InstanceNormalization" in operators(made)
    assert "GroupNorm" not in operators(made)


@pytest.mark.parametrize(("shape", "of", "dims"), [("<start = 1>", "x", "16, h, w"), ("", "line", "B, 16, n, m")])
def test_groups_that_are_joined_to_another_shape_are_left_alone(shape: str, of: str, dims: str) -> None:
    body = NORM.format(shape=shape, after="z = Relu (y)").replace("(x)", f"({of})")
    model = graph(
        f"g (float[B, 16, h, w] x, float[B, 16, n, m] line) => (float[{dims}] z) {{ {body} }}",
        ones=(4,),
        zeros=(4,),
        gamma=(16, 1, 1),
        beta=(16, 1, 1),
    )
    assert "GroupNorm" not in operators(check_text(model, x=(1, 16, 3, 4), line=(1, 16, 12, 1)))


def test_scaled_groups_are_left_alone() -> None:
    model = norm("z = Relu (y)")
    for tensor in model.graph.initializer:
        if tensor.name == "ones":
            tensor.CopyFrom(numpy_helper.from_array(np.array([1, 1, 2, 1], np.float32), "ones"))
    assert "GroupNorm" not in operators(check_text(model, x=(2, 16, 3, 5)))


def feed_forward(width: int, gelu: str = "", split: str = "axis = -1, num_outputs = 2") -> onnx.ModelProto:
    return graph(
        f"""g (float[B, L, 8] x) => (float[B, L, 4] y) {{
            product = MatMul (x, w)
            hidden = Add (product, bias)
            left, right = Split <{split}> (hidden)
            gate = Gelu {gelu} (right)
            gated = Mul (left, gate)
            y = MatMul (gated, out)
        }}""",
        w=(8, width),
        bias=(width,),
        out=(width // 2, 4),
    )


@pytest.mark.parametrize("width", [2560, 5120, 10240])
def test_a_gated_feed_forward_of_stable_diffusions_widths(width: int) -> None:
    model = feed_forward(width, split="axis = 2, num_outputs = 2" if width == 5120 else "axis = -1, num_outputs = 2")
    for tensor in model.graph.initializer:
        if tensor.name == "out":
            tensor.raw_data = (numpy_helper.to_array(tensor) / width).astype(np.float32).tobytes()
    made = check_text(model, x=(2, 3, 8))
    assert operators(made) == ["MatMul", "BiasSplitGelu", "MatMul"]


@pytest.mark.parametrize("model", [feed_forward(256), feed_forward(2560, gelu='<approximate = "tanh">')])
def test_other_feed_forwards_are_left_alone(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        tensor.raw_data = (numpy_helper.to_array(tensor) / 30).astype(np.float32).tobytes()
    assert "BiasSplitGelu" not in operators(check_text(model, x=(2, 3, 8)))


def test_what_lies_between_convolutions_has_its_channels_last() -> None:
    made = check_text(
        graph(
            """g (float[B, 4, h, w] x, float[B, 8] step) => (float[B, 6, H, W] y) {
                a = Conv <pads = [1, 1, 1, 1]> (x, first, bias)
                axes = Constant <value = int64[2] {2, 3}> ()
                row = Unsqueeze (step, axes)
                b = Add (a, row)
                two = Constant <value = float {2.0}> ()
                c = Div (b, two)
                d = Concat <axis = 1> (c, a)
                scales = Constant <value = float[4] {1.0, 1.0, 2.0, 2.0}> ()
                e = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">
                    (d, , scales)
                f = Mul (e, channels)
                y = Conv (f, second)
            }""",
            first=(8, 4, 3, 3),
            bias=(8,),
            channels=(16, 1, 1),
            second=(6, 16, 1, 1),
        ),
        x=(2, 4, 3, 5),
        step=(2, 8),
    )
    assert turned_round(made) == ["x", "y.last"]


def test_operations_may_share_a_constant_of_the_channels() -> None:
    check_text(
        graph(
            """g (float[B, 4, h, w] x) => (float[B, 8, h, w] y, float[B, 8, h, w] z) {
                a = Conv <pads = [1, 1, 1, 1]> (x, first)
                b = Mul (a, channels)
                c = Add (b, channels)
                y = Conv <pads = [1, 1, 1, 1]> (c, second)
                twice = Concat <axis = 1> (x, x)
                z = Mul (twice, channels)
            }""",
            first=(8, 4, 3, 3),
            second=(8, 8, 3, 3),
            channels=(8, 1, 1),
        ),
        x=(2, 4, 3, 5),
    )


def test_what_is_told_of_a_whole_row_needs_no_order() -> None:
    made = check_text(
        graph(
            """g (float[B, 4, h, w] x) => (float[B] least, float[B, 1, 1, 1] mean, float[B, h, W] of_channels) {
                a = Conv <pads = [1, 1, 1, 1]> (x, first)
                nan = IsNaN (a)
                whole = Not (nan)
                number = Cast <to = 1> (whole)
                axes = Constant <value = int64[3] {1, 2, 3}> ()
                least = ReduceMin <keepdims = 0> (number, axes)
                backwards = Constant <value = int64[3] {-1, -2, -3}> ()
                mean = ReduceMean (a, backwards)
                channels = Constant <value = int64[1] {1}> ()
                of_channels = ReduceMax <keepdims = 0> (a, channels)
            }""",
            first=(4, 4, 3, 3),
        ),
        x=(2, 4, 3, 5),
    )
    assert turned_round(made) == ["x", "a.last"]  # the latter for what is left of the channels


def test_what_needs_another_order_gets_it() -> None:
    made = check_text(
        graph(
            """g (float[B, 4, h, w] x) => (float[B, 4, H, W] y, int64[2] size, int64[4] sizes, float[B, N] flat,
                float[B, H, W, 4] tokens) {
                a = Conv <pads = [1, 1, 1, 1]> (x, first)
                size = Shape <start = -2> (a)
                sizes = Shape (a)
                tokens = Transpose <perm = [0, 2, 3, 1]> (a)
                flat = Flatten (a)
                back = Transpose <perm = [0, 3, 1, 2]> (tokens)
                scaled = Mul (back, pixels)
                added = Add (scaled, a)
                y = Conv <pads = [1, 1, 1, 1]> (added, first)
            }""",
            first=(4, 4, 3, 3),
            pixels=(3, 5),
        ),
        x=(2, 4, 3, 5),
    )
    assert operators(made).count("NhwcConv") == 2


def test_convolutions_of_groups_or_of_other_dimensions_are_left_alone() -> None:
    made = check_text(
        graph(
            """g (float[B, 4, h, w] x, float[B, 4, n] line) => (float[B, 4, H, W] y, float[B, 4, M] z) {
                y = Conv <group = 2> (x, grouped)
                z = Conv (line, narrow)
            }""",
            grouped=(4, 2, 3, 3),
            narrow=(4, 4, 3),
        ),
        x=(2, 4, 6, 5),
        line=(2, 4, 9),
    )
    assert operators(made) == ["Conv", "Conv"]
