"""Inputs whose numbers are rows of a table, as a text's tokens are. PyTorch's compiled code ends the process, or makes the GPU
unusable for it, where the table has no such row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from diffuserve.graphs.graph_index import GraphIndex, attributes

if TYPE_CHECKING:
    from onnx import GraphProto

# Their output holds the same numbers as their first input.
_SAME = ("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")


def table_rows(graph: GraphProto) -> Mapping[str, int]:
    """How many rows the table has that an input's numbers are of, by the input's name; the shortest one's, if there are more."""
    index, rows = GraphIndex(graph), dict[str, int]()
    inputs = {value.name: value.name for value in graph.input}  # by the values that hold their numbers
    for node in index.nodes:
        if node.op_type in _SAME and node.input[0] in inputs:
            inputs[node.output[0]] = inputs[node.input[0]]
        elif node.op_type == "Gather" and node.input[1] in inputs and (dims := index.constant_dims(node.input[0])):
            name, count = inputs[node.input[1]], dims[attributes(node).get("axis", 0)]
            rows[name] = min(count, rows.get(name, count))
    return rows


def check_rows(inputs: Mapping[str, NDArray[Any]], rows: Mapping[str, int]) -> None:
    """Raises ValueError where an input has a number that is no row of its table."""
    for name, count in rows.items():
        least, most = inputs[name].min(initial=0), inputs[name].max(initial=0)
        if least < 0 or most >= count:
            raise ValueError(f"{name} has the number {least if least < 0 else most}; expected: 0 to {count - 1}.")
