"""Random weights: in the right place, of the right scale, and the same each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from diffuserve_bench.gpu.weights import fill

_GRAPH = """<ir_version: 10, opset_import: ["": 20]>
layers (float[B, 6, h, w] image, int64[B, n] ids) => (float[B, 8, p, q] filtered, float[B, n, 70] out) {
    convolved = Conv <kernel_shape = [3, 3], group = 2> (image, filters, filter_bias)
    filtered = Mul (convolved, scale)
    embedded = Gather (embedding, ids)
    normed = LayerNormalization (embedded, norm_scale, norm_bias)
    product = MatMul (normed, matrix)
    shifted = Add (product, offset)
    flat = Reshape (shifted, shape)
    gemm = Gemm <transB = 1> (flat, transposed)
    out = Reshape (gemm, back)
}"""
# Name: shape, and the deviation that its layer's inputs call for, or the number that it is full of.
_WEIGHTS = {
    "filters": ((8, 3, 3, 3), (3 * 3 * 3) ** -0.5),
    "filter_bias": ((8,), 0),
    "scale": ((8, 1, 1), 1),
    "embedding": ((400, 50), 50**-0.5),
    "norm_scale": ((50,), 1),
    "norm_bias": ((50,), 0),
    "matrix": ((50, 60), 50**-0.5),
    "offset": ((60,), 0),
    "transposed": ((70, 60), 60**-0.5),
}
_CONSTANTS = {"shape": np.array([-1, 60]), "back": np.array([2, 5, 70])}


def write_bare(path: Path) -> None:
    """The graph with references into a file that is not there."""
    model = onnx.parser.parse_model(_GRAPH)
    offset = 0
    for name, (shape, _) in _WEIGHTS.items():
        tensor = model.graph.initializer.add(name=name, data_type=onnx.TensorProto.FLOAT, dims=shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        length = 4 * int(np.prod(shape))
        for key, value in (("location", f"{path.name}.data"), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        offset += -(-length // 64) * 64
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in _CONSTANTS.items())
    onnx.save(model, path)


def weights_of(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_each_weight_gets_numbers_that_suit_it(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write_bare(path)
    bare = path.read_bytes()
    assert fill(path) == sum(int(np.prod(shape)) for shape, _ in _WEIGHTS.values())
    assert path.read_bytes() == bare
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    filled = weights_of(path)
    for name, (shape, expected) in _WEIGHTS.items():
        assert filled[name].shape == shape
        if expected in (0, 1):
            assert (filled[name] == expected).all()
        else:
            assert filled[name].std() == pytest.approx(expected, rel=0.1)
            assert abs(filled[name].mean()) < 0.2 * expected
    assert all((filled[name] == array).all() for name, array in _CONSTANTS.items())


def test_the_same_each_time_and_never_over_weights_that_are_there(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        write_bare(folder / "model.onnx")
        fill(folder / "model.onnx")
    data = (first / "model.onnx.data").read_bytes()
    assert (second / "model.onnx.data").read_bytes() == data
    (first / "model.onnx.data").write_bytes(bytes(len(data)))
    assert fill(first / "model.onnx") == 0
    assert (first / "model.onnx.data").read_bytes() == bytes(len(data))


def test_the_filled_graph_runs(tmp_path: Path) -> None:
    import onnxruntime

    write_bare(tmp_path / "model.onnx")
    fill(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    image = rng.standard_normal((2, 6, 20, 20), dtype=np.float32)
    outputs = session.run(None, {"image": image, "ids": rng.integers(0, 400, (2, 5))})
    assert all(0.7 < output.std() < 1.4 for output in outputs)  # as the inputs'
