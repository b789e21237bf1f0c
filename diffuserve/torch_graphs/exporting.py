"""A module as a program of PyTorch's own operators, which its compilers take, for any number of rows and any size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from diffuserve.torch_graphs.module import OnnxModule

if TYPE_CHECKING:
    from onnx import GraphProto

# The dims of each input by its name. A free one is `name`, or `4*name` where it is a multiple; those of one name are equal.
Dims = Mapping[str, Sequence[int | str]]


def input_dims(graph: GraphProto) -> Dims:
    """Of a graph."""
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in graph.input
    }


def check_shapes(shapes: Mapping[str, Sequence[int]], dims: Dims) -> None:
    """Raises ValueError where an input is not as `dims` has it: what is compiled would read beyond its end."""
    lengths: dict[str, int] = {}
    for name, shape in shapes.items():
        fits = len(shape) == len(dims[name]) and all(
            _length(side, dim, lengths) for side, dim in zip(shape, dims[name], strict=True)
        )
        if not fits:
            raise ValueError(f"The shape of {name} is {tuple(shape)}; expected: {tuple(dims[name])}, with {lengths}.")


def _length(side: int, dim: int | str, lengths: dict[str, int]) -> bool:
    """Whether `side` may stand for `dim`; notes the length of a free one."""
    if isinstance(dim, int):
        return side == dim
    factor, name = _factor(dim)
    return side > 0 and side % factor == 0 and lengths.setdefault(name, side // factor) == side // factor


def _factor(dim: str) -> tuple[int, str]:
    factor, _, name = dim.rpartition("*")
    return int(factor or 1), name


def exported(module: OnnxModule, dims: Dims, example: Mapping[str, torch.Tensor]) -> torch.export.ExportedProgram:
    """Traces a module.

    Args:
        module: on any device.
        dims: of its inputs.
        example: inputs by name, on the module's device; their sizes are what is compiled for most carefully.

    Raises:
        Exception: PyTorch cannot trace it; it has many kinds.
    """
    free: dict[str, Any] = {}

    def free_dim(dim: str, axis: int) -> Any:
        factor, name = _factor(dim)
        # All but rows are 2 at the least, which spares the tracer a case of their own for 1.
        found = free.setdefault(name, torch.export.Dim(name, min=1 if factor > 1 or not axis else 2))
        return factor * found if factor > 1 else found

    shapes = tuple(
        {axis: free_dim(dim, axis) for axis, dim in enumerate(dims[name]) if isinstance(dim, str)}
        for name in module.input_names
    )
    inputs = tuple(example[name] for name in module.input_names)
    # Without it a call of one row would be traced for itself.
    with torch.no_grad(), torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        return torch.export.export(module, inputs, dynamic_shapes=(shapes,), strict=False)


def largest_value(program: torch.export.ExportedProgram) -> int:
    """The most elements that one value has in a call like the example."""
    values = (value for node in program.graph.nodes for value in _tensors(node.meta.get("val")))
    counts: list[Any] = [value.numel() for value in values]
    most: int = max(count.node.hint if isinstance(count, torch.SymInt) else count for count in counts)
    return most


def _tensors(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [each for each in values if isinstance(each, torch.Tensor)]
