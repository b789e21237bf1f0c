"""A module as a program of PyTorch's own operators, which its compilers take, for any number of rows and any size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from diffuserve.torch_graphs.module import OnnxModule

if TYPE_CHECKING:
    from onnx import GraphProto

# A dim of the graph's inputs by name and axis: free ones are `name`, or `4*name` where it is a multiple.
FreeDims = Mapping[str, Mapping[int, str]]


def free_dims(graph: GraphProto) -> FreeDims:
    """Of a graph's inputs."""
    return {
        value.name: {axis: dim.dim_param for axis, dim in enumerate(value.type.tensor_type.shape.dim) if dim.dim_param}
        for value in graph.input
    }


def exported(module: OnnxModule, free: FreeDims, example: Mapping[str, torch.Tensor]) -> torch.export.ExportedProgram:
    """Traces a module.

    Args:
        module: on any device.
        free: dims that are free, by input.
        example: inputs by name, on the module's device; their sizes are what is compiled for most carefully.

    Raises:
        Exception: PyTorch cannot trace it; it has many kinds.
    """
    dims: dict[str, Any] = {}

    def dim(text: str, axis: int) -> Any:
        factor, _, name = text.rpartition("*")
        # All but rows are 2 at the least, which spares the tracer a case of their own for 1.
        found = dims.setdefault(name, torch.export.Dim(name, min=1 if factor or not axis else 2))
        return int(factor) * found if factor else found

    shapes = tuple({axis: dim(text, axis) for axis, text in free[name].items()} for name in module.input_names)
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
