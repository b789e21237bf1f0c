"""Random weights for graphs that were exported without them."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

# Of the inputs of these operators, what a layer is scaled by: with 1 it leaves its input's scale alone.
_SCALES = {("Mul", 0), ("Mul", 1), ("LayerNormalization", 1), ("GroupNormalization", 1)}


def fill(path: Path) -> int:
    """Writes the data file of a graph whose weights are references into one that is not there.

    Matrices and filters are normal with a standard deviation of 1 / sqrt(fan-in) (LeCun et al., Efficient BackProp, 1998),
    so that activations neither vanish nor grow out of fp16's range; scales are 1 and offsets 0. The same weights each time.

    Args:
        path: the .onnx file.

    Returns:
        The number of weights; 0 if the graph has its weights, and then nothing is written.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    missing = [
        tensor
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL and not (path.parent / _place(tensor)["location"]).exists()
    ]
    if not missing:
        return 0
    uses = _uses(model)
    [location] = {_place(tensor)["location"] for tensor in missing}
    aside = path.with_name(f".{location}.{os.getpid()}")
    try:
        descriptor = os.open(aside, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        try:
            with ThreadPoolExecutor() as pool:
                for done in [pool.submit(_write, descriptor, tensor, uses[tensor.name]) for tensor in missing]:
                    done.result()
        finally:
            os.close(descriptor)
        aside.replace(path.with_name(location))
    finally:
        aside.unlink(missing_ok=True)
    return sum(math.prod(tensor.dims) for tensor in missing)


def _place(tensor: TensorProto) -> dict[str, str]:
    """Location and offset of the data."""
    return {entry.key: entry.value for entry in tensor.external_data}


def _uses(model: ModelProto) -> dict[str, tuple[str, int]]:
    """By initializer: the operator that takes it first, with a "T" after it for a matrix that it transposes, and the position
    of the input."""
    uses: dict[str, tuple[str, int]] = {}
    for node in model.graph.node:
        transposes = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        for position, name in enumerate(node.input):
            uses.setdefault(name, (f"{node.op_type}T" if transposes else node.op_type, position))
    return uses


def _write(descriptor: int, tensor: TensorProto, use: tuple[str, int]) -> None:
    place = _place(tensor)
    weights = random_weights(tensor.name, tuple(tensor.dims), use)
    data = memoryview(weights.data).cast("B")
    offset = int(place.get("offset", 0))
    while data:  # one call writes 2 GB at most
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def random_weights(name: str, shape: tuple[int, ...], use: tuple[str, int]) -> NDArray[np.float32]:
    """Args:
    name: decides the numbers.
    shape: of the weight.
    use: the operator, as in `_uses`, and the position of its input.
    """
    if sum(side > 1 for side in shape) < 2:
        return np.full(shape, 1.0 if use in _SCALES else 0.0, np.float32)
    weights = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    weights /= np.float32(math.sqrt(_fan_in(shape, use[0])))
    return weights


def _fan_in(shape: tuple[int, ...], operator: str) -> int:
    """How many products are summed for each number that the operator makes; of an embedding, its width."""
    matrix_first: Mapping[str, int] = {"MatMul": shape[-2], "Gemm": shape[-2]}
    return matrix_first.get(operator, math.prod(shape[1:]))
