"""A module as a program of PyTorch's own operators, which its compilers take, for any number of rows and any size."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from diffuserve.errors import BundleError
from diffuserve.torch_graphs.module import OnnxModule

if TYPE_CHECKING:
    from onnx import GraphProto

_FREE = re.compile(r"(?:([1-9]\d*)\*)?(\w+)")


class FreeDim(NamedTuple):
    """A dim of any length that is a multiple of `factor`; those of one name are the same multiple."""

    name: str
    factor: int = 1


# The dims of each input, by its name.
Dims = Mapping[str, Sequence[int | FreeDim]]


def input_dims(graph: GraphProto) -> Dims:
    """Of a graph.

    Raises:
        BundleError: one is not written as the export writes it.
    """
    return {
        value.name: [
            _free_dim(dim.dim_param) if dim.dim_param else dim.dim_value for dim in value.type.tensor_type.shape.dim
        ]
        for value in graph.input
    }


def _free_dim(text: str) -> FreeDim:
    """Of `name` or `4*name`."""
    found = _FREE.fullmatch(text)
    if found is None:
        raise BundleError(f"An input of the graph has the dim {text!r}. Export the checkpoint again.")
    return FreeDim(found[2], int(found[1] or 1))


def check_shapes(shapes: Mapping[str, Sequence[int]], dims: Dims) -> None:
    """Raises ValueError where an input is not as `dims` has it: what is compiled would read beyond its end."""
    lengths: dict[str, int] = {}
    for name, shape in shapes.items():
        fits = len(shape) == len(dims[name]) and all(
            _fits(side, dim, lengths) for side, dim in zip(shape, dims[name], strict=True)
        )
        if not fits:
            expected = ", ".join(str(dim) if isinstance(dim, int) else f"{dim.factor}*{dim.name}" for dim in dims[name])
            raise ValueError(f"The shape of {name} is {tuple(shape)}; expected: ({expected}), with {lengths}.")


def _fits(side: int, dim: int | FreeDim, lengths: dict[str, int]) -> bool:
    """Whether `side` may stand for `dim`; notes the length of a free one."""
    if isinstance(dim, int):
        return side == dim
    multiple = side // dim.factor
    return side > 0 and side % dim.factor == 0 and lengths.setdefault(dim.name, multiple) == multiple


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

    def symbol(dim: FreeDim, axis: int) -> Any:
        # All but rows are 2 at the least, which spares the tracer a case of their own for 1. No name is the file's.
        least = 1 if dim.factor > 1 or not axis else 2
        found = free.setdefault(dim.name, torch.export.Dim(f"free_{len(free)}", min=least))
        return dim.factor * found if dim.factor > 1 else found

    shapes = tuple(
        {axis: symbol(dim, axis) for axis, dim in enumerate(dims[name]) if isinstance(dim, FreeDim)}
        for name in module.input_names
    )
    inputs = tuple(example[name] for name in module.input_names)
    # Without it a call of one row would be traced for itself.
    one_as_any = torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with torch.no_grad(), one_as_any, warnings.catch_warnings(action="ignore"):  # of PyTorch, about itself
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
