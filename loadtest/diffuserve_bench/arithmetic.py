"""How much a graph computes, and how much this machine can."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffuserve_bench.onnxruntime_profile import NodeCall, node_calls

_SIDE = 2048
_PRODUCTS = 5


def flops_of_onnx(path: Path, inputs: Mapping[str, NDArray[Any]]) -> int:
    """Floating-point operations of one run: two for each multiplication in convolutions and matrix products, and nothing
    for the rest, which is a percent or two. From the file's own nodes, with the shapes that they have in a run.

    Args:
        path: the .onnx file.
        inputs: by name.
    """
    return 2 * sum(map(_multiplications, node_calls(path, inputs, calls=1, optimised=False)))


def _multiplications(call: NodeCall) -> int:
    if call.operator == "Conv":  # each element of the output is one filter's
        return math.prod(call.output_shapes[0]) * math.prod(call.input_shapes[1][1:])
    if call.operator == "MatMul":
        return math.prod(call.output_shapes[0]) * call.input_shapes[0][-1]
    if call.operator == "Gemm":  # whichever of its factors are transposed
        return math.prod(call.input_shapes[0]) * call.output_shapes[0][1]
    return 0


def matrix_product_flops_per_s(precision: str) -> float | None:
    """The best of a few products of two square matrices of side 2048: PyTorch's where it is installed, else numpy's, which
    has no bf16, so that there is none.

    Args:
        precision: "fp32" or "bf16".
    """
    product = _product(precision)
    if product is None:
        return None
    product()
    best_s = math.inf
    for _ in range(_PRODUCTS):
        started_s = time.perf_counter()
        product()
        best_s = min(best_s, time.perf_counter() - started_s)
    return 2 * _SIDE**3 / best_s


def _product(precision: str) -> Callable[[], Any] | None:
    matrix = np.random.default_rng(0).standard_normal((_SIDE, _SIDE), dtype=np.float32)
    if find_spec("torch"):
        import torch

        tensor = torch.from_numpy(matrix).to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
        return lambda: tensor @ tensor
    return (lambda: matrix @ matrix) if precision == "fp32" else None
