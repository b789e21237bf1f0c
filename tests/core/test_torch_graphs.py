"""PyTorch's modules of ONNX graphs, as they are, against ONNX Runtime: every stage, in every precision, at several sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from numpy.typing import NDArray

from diffuserve.bundle.manifest import read_manifest
from diffuserve.engines.example_inputs import Arrays, example_inputs
from diffuserve.engines.onnxruntime import OnnxRuntimeEngine
from diffuserve.errors import BundleError
from diffuserve.graphs.sixteen_bit import sixteen_bit_from_onnx
from diffuserve.tensors import SAFETY_CHECKER, STAGES, TEXT_ENCODER, UNET, StageSpec
from diffuserve.torch_graphs.cuda_graphs import MOST_ROWS, GraphedCalls
from diffuserve.torch_graphs.exporting import FreeDim, check_shapes, input_dims
from diffuserve.torch_graphs.fusing import fuse_for_torch
from diffuserve.torch_graphs.lookups import table_rows
from diffuserve.torch_graphs.module import OnnxModule
from diffuserve.trials.tolerance import tolerance_of
from tests.core.tiny_graphs import make_real_bundle
from tests.families import Family

CPU = torch.device("cpu")
PRECISIONS = ("fp32", "fp16", "bf16")


def module_of(path: Path) -> OnnxModule:
    model = onnx.load(path, load_external_data=False)
    fuse_for_torch(model)
    return OnnxModule(model, path.parent, CPU)


def run(module: OnnxModule, inputs: Arrays) -> Arrays:
    with torch.no_grad():
        outputs = module(*(torch.from_numpy(inputs[name]) for name in module.input_names))
    return {name: tensor.numpy() for name, tensor in zip(module.output_names, outputs, strict=True)}


def check(bundle: Path, folder: Path, stage: str, precision: str) -> OnnxModule:
    """A stage's module in a precision, compared at several sizes, numbers of rows and of tokens."""
    manifest, path = read_manifest(bundle), bundle / stage / "model.onnx"
    tensors, model = manifest.components[stage].tensors, manifest.model
    reference, narrow = OnnxRuntimeEngine(path), path
    if precision != "fp32":
        narrow = folder / f"{stage}.{precision}.onnx"
        sixteen_bit_from_onnx(path, narrow, precision)
    module = module_of(narrow)
    tokens = model.max_tokens * (2 if stage == UNET else 1)
    wide = msgspec.structs.replace(
        model, width=model.width + model.size_multiple, height=model.size_multiple, max_tokens=tokens
    )
    # As a prompt is embedded: numbers of other sizes make more of what 16 bits lose.
    known = OnnxRuntimeEngine(bundle / TEXT_ENCODER / "model.onnx")(
        example_inputs(manifest.components[TEXT_ENCODER].tensors, model, 2)
    )
    for size, rows in ((model, 1), (wide, 3), (wide, 1)):
        inputs = example_inputs(tensors, size, rows, known)
        check_outputs(run(module, inputs), reference(inputs), tensors, precision)
    return module


def check_outputs(actual: Arrays, expected: Arrays, tensors: StageSpec, precision: str) -> None:
    assert actual.keys() == expected.keys()
    tolerance = tolerance_of(tensors, precision, expected)
    for name, array in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (array.dtype, array.shape)
        assert np.abs(actual[name].astype(np.float64) - array).max() <= tolerance


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_the_bundled_model(bundle: Path, tmp_path: Path, stage: str, precision: str) -> None:
    check(bundle, tmp_path, stage, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_each_family(family: Family, tmp_path: Path, stage: str, precision: str) -> None:
    check(family.bundle, tmp_path, stage, precision)


def test_every_kind_of_weight_is_there_once(bundle: Path) -> None:
    module = module_of(bundle / UNET / "model.onnx")
    stored = onnx.load(bundle / UNET / "model.onnx")
    size = sum(onnx.numpy_helper.to_array(each).nbytes for each in stored.graph.initializer)
    held = sum(buffer.untyped_storage().nbytes() for buffer in module.buffers())
    assert 0.99 * size < held <= size  # sizes of shapes are none


def test_weights_beside_the_graph_are_mapped(bundle: Path, tmp_path: Path) -> None:
    model = onnx.load(bundle / UNET / "model.onnx")
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="weights", size_threshold=64)
    module = module_of(tmp_path / "model.onnx")
    assert str(tmp_path / "weights") in Path("/proc/self/maps").read_text()
    manifest = read_manifest(bundle)
    inputs = example_inputs(manifest.components[UNET].tensors, manifest.model, 2)
    expected = run(module_of(bundle / UNET / "model.onnx"), inputs)
    np.testing.assert_allclose(run(module, inputs)["noise_pred"], expected["noise_pred"], atol=1e-4)


def external(tmp_path: Path, location: str, length: int) -> Path:
    """A graph of one weight of 4 bytes, which is in a file of `length` bytes at `location`."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / location).write_bytes(bytes(length))
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[B] x) => (float[B] y) {y = Add (x, w)}'
    )
    weight = onnx.TensorProto(name="w", dims=[1], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=location)
    model.graph.initializer.append(weight)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


@pytest.mark.parametrize("location", ["../outside", "link"])
def test_weights_elsewhere_are_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "outside").write_bytes(bytes(4))
    path = external(tmp_path, location, 4)
    if location == "link":
        (path.parent / "link").unlink()
        (path.parent / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match=r"The weights w are to be in .*, which is no file beside the graph\."):
        module_of(path)


def test_weights_that_end_too_early_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"weights ends before the weights w\. Export the checkpoint again\."):
        module_of(external(tmp_path, "weights", 3))
    (tmp_path / "bundle" / "weights").write_bytes(bytes(4))
    assert run(module_of(tmp_path / "bundle" / "model.onnx"), {"x": np.ones(2, np.float32)})["y"].tolist() == [1, 1]


def test_an_operator_that_is_not_known_is_named(tmp_path: Path) -> None:
    text = '<ir_version: 10, opset_import: ["": 20]> g (float[B] x) => (float[B] y) {y = Acosh (x)}'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    with pytest.raises(
        BundleError, match=r"has the operator Acosh, which the engine torch does not know.*--select auto"
    ):
        module_of(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("text", "x"),
    [
        ("(float[A,B,C,D] x) => (float[E,F] y) {y = Flatten (x)}", np.ones((2, 3, 4, 5), np.float32)),
        ("(float[A,B,C,D] x) => (float[E,F] y) {y = Flatten <axis = 2> (x)}", np.ones((2, 3, 4, 5), np.float32)),
        ("(float[A,B,C,D] x) => (float[E,F] y) {y = Flatten <axis = 0> (x)}", np.ones((2, 3, 4, 5), np.float32)),
        ("(int32[A,B] x) => (int32[C,D] y) {y = ReduceSum (x)}", np.ones((2, 3), np.int32)),
    ],
)
def test_single_operators(tmp_path: Path, text: str, x: NDArray[Any]) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> g {text}'), path)
    [actual], [expected] = run(module_of(path), {"x": x}).values(), OnnxRuntimeEngine(path)({"x": x}).values()
    np.testing.assert_array_equal(actual, expected, strict=True)


def test_a_graph_of_operators_that_meant_something_else_is_refused(tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[A,B] x) => (float[A,C] y) {y = ReduceMean <axes: ints = [1]> (x)}'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    with pytest.raises(BundleError, match=r"ONNX's opset 17, and the engine torch runs those from 18 on\. Export"):
        module_of(tmp_path / "model.onnx")


def test_an_enlargement_by_no_whole_number_is_refused(tmp_path: Path) -> None:
    text = (
        '<ir_version: 10, opset_import: ["": 20]> g (float[A,B,C,D] x) => (float[A,B,E,F] y) '
        '<float[4] s = {1.0, 1.0, 1.5, 2.0}> {y = Resize <mode = "nearest"> (x, , s)}'
    )
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    with pytest.raises(NotImplementedError, match=r"Resize by \[1.0, 1.0, 1.5, 2.0\]"):
        run(module_of(tmp_path / "model.onnx"), {"x": np.ones((1, 1, 2, 2), np.float32)})


@pytest.mark.parametrize(
    "shapes",
    [
        {"x": (1, 4, 8), "t": (2, 1)},
        {"x": (1, 4, 10), "t": (1, 1)},
        {"x": (1, 3, 8), "t": (1, 1)},
        {"x": (1, 4), "t": (1, 1)},
        {"x": (0, 4, 8), "t": (0, 1)},
    ],
)
def test_shapes_that_are_not_the_graphs(shapes: dict[str, Sequence[int]]) -> None:
    dims = {"x": [FreeDim("rows"), 4, FreeDim("width", 4)], "t": [FreeDim("rows"), 1]}
    check_shapes({"x": (3, 4, 8), "t": (3, 1)}, dims)
    with pytest.raises(ValueError, match=r"The shape of [xt] is \(.*\); expected: \(1\*rows, "):
        check_shapes(shapes, dims)


def test_a_dim_that_no_export_writes_is_refused() -> None:
    for dim in ("__import__('os')", "0*x", "x*4", "2*3*x", "*x", "a b"):
        value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [dim, 4])
        with pytest.raises(BundleError, match="An input of the graph has the dim "):
            input_dims(onnx.helper.make_graph([], "g", [value], []))


def test_inputs_whose_numbers_are_rows_of_tables(family: Family) -> None:
    path = family.bundle / TEXT_ENCODER / "model.onnx"
    rows = table_rows(onnx.load(path, load_external_data=False).graph)
    assert rows.keys() == {spec.name for spec in read_manifest(family.bundle).components[TEXT_ENCODER].tensors.inputs}
    assert min(rows.values()) > 100
    assert not table_rows(onnx.load(family.bundle / UNET / "model.onnx", load_external_data=False).graph)


class Recorder:
    """A device that is none: what is captured is called again when it is replayed."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.captured = 0
        self.fails = False

    def call(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self.calls.append(len(inputs[0]))
        return [2 * inputs[0]]

    def capture(self, function: object) -> object:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captured += 1
        outputs: list[torch.Tensor] = []

        def replay() -> None:
            function()  # type: ignore[operator]
            outputs.append(torch.empty(0))

        return replay


def graphed() -> tuple[GraphedCalls, Recorder]:
    recorder = Recorder()
    return GraphedCalls(recorder.call, recorder.capture), recorder  # type: ignore[arg-type]


def test_graphs_of_few_rows() -> None:
    calls, recorder = graphed()
    kept = []
    for rows in (2, 2, 3, 2, 3, 3, MOST_ROWS + 1, MOST_ROWS + 1):
        x = torch.randn(rows, 3)
        [y] = calls([x])
        kept.append((x, y))
    assert recorder.captured == 2
    for x, y in kept:  # none lies in a graph's memory
        torch.testing.assert_close(y, 2 * x)


def test_the_graph_that_was_used_the_longest_ago_goes() -> None:
    calls, recorder = graphed()
    shapes = [(rows, width) for rows in (1, 2) for width in range(1, 10)]
    for shape in shapes:
        for _ in range(2):
            calls([torch.ones(shape)])
    assert recorder.captured == len(shapes)
    calls([torch.ones(shapes[-1])])
    assert recorder.captured == len(shapes)
    for _ in range(2):
        calls([torch.ones(shapes[0])])
    assert recorder.captured == len(shapes) + 1


def test_what_cannot_be_captured_runs_without(caplog: pytest.LogCaptureFixture) -> None:
    calls, recorder = graphed()
    recorder.fails = True
    for _ in range(4):
        [y] = calls([torch.ones(2, 3)])
        assert (y == 2).all()
    assert [record.getMessage() for record in caplog.records] == [
        "going on without CUDA graphs: operation not permitted when stream is capturing"
    ]


def test_a_capture_that_fails_leaves_the_stream_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = ["the caller's"]

    class FailingCapture:
        """As `torch.cuda.graph`, whose end raises before it goes back to the caller's stream."""

        def __init__(self, graph: object, **options: object) -> None:
            pass

        def __enter__(self) -> None:
            streams.append("the capture's")

        def __exit__(self, *error: object) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", FailingCapture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    calls = GraphedCalls(lambda inputs: [2 * inputs[0]])
    for _ in range(2):
        [y] = calls([torch.ones(2, 3)])
        assert (y == 2).all()
    assert streams == ["the caller's", "the capture's", "the caller's"]


def test_a_safety_checker(tmp_path: Path) -> None:
    make_real_bundle(tmp_path)
    for precision in PRECISIONS:
        check(tmp_path, tmp_path, SAFETY_CHECKER, precision)
