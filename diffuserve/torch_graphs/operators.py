"""ONNX's operators in PyTorch, as far as exported graphs use them: https://onnx.ai/onnx/operators, and com.microsoft's in
`diffuserve.graphs`.

A value is a tensor, or sizes: an integer of 64 bits, or a list of them for a vector. Sizes are Python's integers, so that
PyTorch's tracers see shapes where a graph computes shapes, and keep them free.

An operator takes the node's attributes by name, with "device" for the module's, and its inputs in their order, None for one
that is left out. It returns its output, or a list of outputs where there are several.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as functional

# ONNX's numbers of types, onnx.TensorProto.DataType.
DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}

Attributes = Mapping[str, Any]
Operator = Callable[..., Any]


def _elementwise(of_tensors: Operator, of_sizes: Operator | None = None) -> Operator:
    """An operation on one or two values, element by element."""

    def run(_: Attributes, *values: Any) -> Any:
        if of_sizes is None or any(isinstance(value, torch.Tensor) for value in values):
            return of_tensors(*(_as_tensor(value, values) if isinstance(value, list) else value for value in values))
        if all(not isinstance(value, list) for value in values):
            return of_sizes(*values)
        count = max(len(value) for value in values if isinstance(value, list))
        spread = [value * count if isinstance(value, list) and len(value) == 1 else value for value in values]
        rows = zip(*(value if isinstance(value, list) else [value] * count for value in spread), strict=True)
        return [of_sizes(*row) for row in rows]

    return run


def _as_tensor(sizes: Any, beside: tuple[Any, ...]) -> torch.Tensor:
    """Sizes as a tensor, where the first of the tensors `beside` is."""
    device = next((value.device for value in beside if isinstance(value, torch.Tensor)), None)
    return torch.tensor(sizes, dtype=torch.int64, device=device)


def _divide(left: torch.Tensor, right: Any) -> torch.Tensor:
    whole = not left.is_floating_point()
    return torch.div(left, right, rounding_mode="trunc" if whole else None)


def _shape(attributes: Attributes, x: torch.Tensor) -> Any:
    return list(x.shape[attributes.get("start", 0) : attributes.get("end")])


def _reshape(attributes: Attributes, x: Any, shape: list[Any]) -> Any:
    if not isinstance(x, torch.Tensor):  # sizes: a number to a vector, or the other way round
        flat = x if isinstance(x, list) else [x]
        return flat if shape else flat[0]
    if not attributes.get("allowzero", 0):
        shape = [x.shape[at] if isinstance(side, int) and side == 0 else side for at, side in enumerate(shape)]
    return x.reshape(shape)


def _flatten(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    """To two dims."""
    axis = attributes.get("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _squeeze(_: Attributes, x: Any, axes: list[int] | None = None) -> Any:
    if isinstance(x, list):
        (size,) = x
        return size
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def _unsqueeze(_: Attributes, x: Any, axes: list[int]) -> Any:
    if not isinstance(x, torch.Tensor):
        return [x]
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _concat(attributes: Attributes, *values: Any) -> Any:
    if all(isinstance(value, list) for value in values):
        return [size for value in values for size in value]
    return torch.cat(
        [_as_tensor(value, values) if isinstance(value, list) else value for value in values], attributes["axis"]
    )


def _slice(
    _: Attributes, x: Any, starts: list[int], ends: list[int], axes: list[int] | None = None, steps: Any = None
) -> Any:
    steps = steps or [1] * len(starts)
    if isinstance(x, list):
        return x[starts[0] : ends[0] : steps[0]]
    at = [slice(None)] * x.dim()
    for axis, start, end, step in zip(axes or range(len(starts)), starts, ends, steps, strict=True):
        at[axis] = slice(start, end, step)
    return x[tuple(at)]


def _split(attributes: Attributes, x: torch.Tensor, sizes: list[int] | None = None) -> list[torch.Tensor]:
    axis = attributes.get("axis", 0)
    if sizes is None:
        sizes = -(-x.shape[axis] // attributes["num_outputs"])  # the last one has what is left
    return list(torch.split(x, sizes, axis))


def _gather(attributes: Attributes, data: Any, indices: Any) -> Any:
    if isinstance(data, list):
        return [data[at] for at in indices] if isinstance(indices, list) else data[indices]
    axis = attributes.get("axis", 0)
    if isinstance(indices, int):
        return data.select(axis, indices)
    if isinstance(indices, list):
        indices = _as_tensor(indices, (data,))
    if axis == 0 and data.dim() == 2:
        return functional.embedding(indices, data)
    picked = data.index_select(axis, indices.reshape(-1).to(torch.int64))
    axis %= data.dim()
    return picked.reshape([*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]])


def _gather_nd(attributes: Attributes, data: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    if attributes.get("batch_dims", 0):
        raise NotImplementedError("GatherND with batch_dims")
    return data[tuple(indices.unbind(-1))]


def _expand(_: Attributes, x: torch.Tensor, shape: list[Any]) -> torch.Tensor:
    """Both are broadcast to each other."""
    if not x.dim():
        return x.new_zeros(shape) + x  # a view of a number is more than PyTorch's compiler can take
    missing = len(shape) - x.dim()
    own = [1] * missing + list(x.shape)
    given = [1] * -missing + list(shape)
    return x.expand(
        [side if isinstance(want, int) and want == 1 else want for side, want in zip(own, given, strict=True)]
    )


def _convolve(attributes: Attributes, x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
    sides = weight.dim() - 2
    if attributes.get("auto_pad", "NOTSET") != "NOTSET":
        raise NotImplementedError(f"auto_pad {attributes['auto_pad']}")
    pads = attributes.get("pads", [0] * 2 * sides)
    before, after = pads[:sides], pads[sides:]
    if before != after:
        x = functional.pad(x, [pad for pair in zip(before[::-1], after[::-1], strict=True) for pad in pair])
        before = [0] * sides
    ones = [1] * sides
    return torch.convolution(
        x,
        weight,
        bias,
        attributes.get("strides", ones),
        before,
        attributes.get("dilations", ones),
        False,
        [0] * sides,
        attributes.get("group", 1),
    )


def _gemm(attributes: Attributes, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
    a = a.t() if attributes.get("transA", 0) else a
    b = b.t() if attributes.get("transB", 0) else b
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    if c is None:
        c = a.new_zeros(())
    return torch.addmm(c, a, b, beta=beta, alpha=alpha)


def _layer_norm(attributes: Attributes, x: torch.Tensor, scale: torch.Tensor, bias: Any = None) -> torch.Tensor:
    shape = x.shape[attributes.get("axis", -1) :]
    y: torch.Tensor = functional.layer_norm(x, shape, scale, bias, attributes.get("epsilon", 1e-5))
    return y


def _instance_norm(attributes: Attributes, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return functional.group_norm(x, x.shape[1], scale, bias, attributes.get("epsilon", 1e-5))


def _group_norm(attributes: Attributes, x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """com.microsoft.GroupNorm, whose sums are in fp32 whatever the type of `x`; so are PyTorch's."""
    if torch.compiler.is_exporting():
        y = _group_norm_by_channels(x, attributes["groups"], gamma, beta, attributes["epsilon"])
    else:
        y = functional.group_norm(x, attributes["groups"], gamma.to(x.dtype), beta.to(x.dtype), attributes["epsilon"])
    return functional.silu(y) if attributes["activation"] else y


def _group_norm_by_channels(
    x: torch.Tensor, groups: int, gamma: torch.Tensor, beta: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """Each channel's mean and variance first, and then the group's of these: where channels are last in memory, compiled code
    reads neighbours together. A group's variance is the mean of the variances and the variance of the means (Chan et al. 1979,
    for parts of one size)."""
    rows, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(rows, height * width, channels).float()
    variances, means = (each.reshape(rows, groups, -1) for each in torch.var_mean(pixels, 1, correction=0))
    mean = means.mean(2, keepdim=True)
    variance = (variances + (means - mean).square()).mean(2, keepdim=True)
    scale = (variance + epsilon).rsqrt().expand(means.shape).reshape(rows, 1, channels) * gamma.float()
    mean = mean.expand(means.shape).reshape(rows, 1, channels)
    y = ((pixels - mean) * scale + beta.float()).to(x.dtype)
    return y.reshape(rows, height, width, channels).permute(0, 3, 1, 2)


def _attention(attributes: Attributes, *tokens: torch.Tensor) -> torch.Tensor:
    """com.microsoft.MultiHeadAttention of query, key and value, (B, L, H * D) each."""
    query, key, value = (each.reshape(*each.shape[:2], attributes["num_heads"], -1).transpose(1, 2) for each in tokens)
    y = functional.scaled_dot_product_attention(query, key, value, scale=attributes["scale"])
    return y.transpose(1, 2).flatten(2)


def _resize(attributes: Attributes, x: torch.Tensor, _roi: Any, scales: list[float], *sizes: Any) -> torch.Tensor:
    """Enlargement by whole numbers, to the nearest."""
    if sizes or attributes.get("mode", "nearest") != "nearest" or scales[:2] != [1, 1]:
        raise NotImplementedError(f"Resize by {scales}, mode {attributes.get('mode')}")
    factors = [int(factor) for factor in scales[2:]]
    if factors != scales[2:]:
        raise NotImplementedError(f"Resize by {scales}")
    height, width = (factor * side for factor, side in zip(factors, x.shape[2:], strict=True))
    return functional.interpolate(x, size=(height, width), mode="nearest")


def _axes(attributes: Attributes, x: torch.Tensor, axes: list[int] | None) -> tuple[list[int], bool]:
    """The axes of a reduction, and whether it keeps them."""
    if not axes and attributes.get("noop_with_empty_axes", 0):
        raise NotImplementedError("a reduction of no axes")
    return axes or list(range(x.dim())), bool(attributes.get("keepdims", 1))


def _reduce(reduction: Operator) -> Operator:
    def run(attributes: Attributes, x: torch.Tensor, axes: list[int] | None = None) -> torch.Tensor:
        dims, keeps = _axes(attributes, x, axes)
        result: torch.Tensor = reduction(x, dims, keeps)
        return result

    return run


def _arg_max(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    if attributes.get("select_last_index", 0):
        raise NotImplementedError("ArgMax of the last index")
    return x.argmax(attributes.get("axis", 0), bool(attributes.get("keepdims", 1)))


def _cast(attributes: Attributes, x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return x.to(DTYPES[attributes["to"]])
    if DTYPES[attributes["to"]] != torch.int64:
        raise NotImplementedError("Cast of sizes")
    return x


def _clip(_: Attributes, x: torch.Tensor, least: Any = None, most: Any = None) -> torch.Tensor:
    x = x if least is None else torch.maximum(x, least)
    return x if most is None else torch.minimum(x, most)


def _range(attributes: Attributes, start: Any, limit: Any, step: Any) -> torch.Tensor:
    return torch.arange(start, limit, step, device=attributes["device"])


def _average_pool(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    if any(attributes.get("pads", [])) or attributes.get("ceil_mode", 0):
        raise NotImplementedError("AveragePool with pads")
    return functional.avg_pool2d(x, attributes["kernel_shape"], attributes.get("strides", 1))


def _gelu(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate=attributes.get("approximate", "none"))


OPERATORS: dict[str, Operator] = {
    "Abs": _elementwise(torch.abs),
    "Add": _elementwise(operator.add, operator.add),
    "And": _elementwise(torch.logical_and),
    "ArgMax": _arg_max,
    "AveragePool": _average_pool,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _convolve,
    "Cos": _elementwise(torch.cos),
    "Div": _elementwise(_divide, operator.floordiv),
    "Equal": _elementwise(torch.eq, operator.eq),
    "Erf": _elementwise(torch.erf),
    "Exp": _elementwise(torch.exp),
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "Identity": lambda _, x: x,
    "InstanceNormalization": _instance_norm,
    "IsInf": _elementwise(torch.isinf),
    "IsNaN": _elementwise(torch.isnan),
    "LayerNormalization": _layer_norm,
    "MatMul": lambda _, a, b: a @ b,
    "Max": _elementwise(torch.maximum, max),
    "Min": _elementwise(torch.minimum, min),
    "Mul": _elementwise(operator.mul, operator.mul),
    "Neg": _elementwise(operator.neg, operator.neg),
    "Not": _elementwise(torch.logical_not),
    "Or": _elementwise(torch.logical_or),
    "Pow": _elementwise(operator.pow),
    "Range": _range,
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceSum": _reduce(lambda x, dims, keeps: x.sum(dims, keeps, dtype=x.dtype)),
    "Reshape": _reshape,
    "Resize": _resize,
    "Round": _elementwise(torch.round),
    "Shape": _shape,
    "Sigmoid": _elementwise(torch.sigmoid),
    "Sin": _elementwise(torch.sin),
    "Slice": _slice,
    "Softmax": lambda attributes, x: x.softmax(attributes.get("axis", -1)),
    "Split": _split,
    "Sqrt": _elementwise(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _elementwise(operator.sub, operator.sub),
    "Tanh": _elementwise(torch.tanh),
    "Transpose": lambda attributes, x: x.permute(attributes["perm"]),
    "Unsqueeze": _unsqueeze,
    "Where": lambda _, condition, x, y: torch.where(condition, x, y),
    "com.microsoft.GroupNorm": _group_norm,
    "com.microsoft.MultiHeadAttention": _attention,
}
