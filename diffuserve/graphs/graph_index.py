"""Looking around in an ONNX graph, for whoever puts one operator in the place of several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

# ONNX Runtime's own operators.
CONTRIB = "com.microsoft"
# A value's dims, None where they are free.
Shape = tuple[int | None, ...]


class GraphIndex:
    """The nodes of a graph by what they make and what they take, as it was when this was made."""

    def __init__(self, graph: GraphProto) -> None:
        self.nodes = list(graph.node)
        self.outputs = {value.name for value in graph.output}
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._producer = {name: node for node in self.nodes for name in node.output}
        self._consumers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self._consumers.setdefault(name, []).append(node)

    def made_by(self, operator: str, name: str) -> NodeProto | None:
        """The node that makes the value, if it is an `operator`."""
        node = self._producer.get(name)
        return node if node is not None and node.op_type == operator else None

    def consumers(self, name: str) -> list[NodeProto]:
        """The nodes that take the value; one that takes it twice is there twice."""
        return self._consumers.get(name, [])

    def only_consumer(self, operator: str, name: str) -> NodeProto | None:
        """The node that takes the value, if it is an `operator`, and nobody else takes it."""
        consumers = self.consumers(name)
        alone = len(consumers) == 1 and name not in self.outputs
        return consumers[0] if alone and consumers[0].op_type == operator else None

    def constant_dims(self, name: str) -> tuple[int, ...] | None:
        """A constant's dims; None if it is none."""
        if name in self.initializers:
            return tuple(self.initializers[name].dims)
        node = self.made_by("Constant", name)
        if node is None:
            return None
        tensor = attributes(node).get("value")
        return tuple(tensor.dims) if tensor is not None else None

    def numbers(self, name: str) -> list[float] | None:
        """A small constant's values; None if it is none, or if its values lie in another file."""
        from onnx import TensorProto, numpy_helper

        tensor = self.initializers.get(name)
        if tensor is None and (node := self.made_by("Constant", name)) is not None:
            tensor = attributes(node).get("value")
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
            return None
        return [float(value) for value in numpy_helper.to_array(tensor).ravel()]


def inferred_shapes(model: ModelProto) -> dict[str, Shape]:
    """Of the values, by name, where ONNX can tell them."""
    from onnx import shape_inference

    graph = shape_inference.infer_shapes(model).graph
    return {
        value.name: tuple(dim.dim_value or None for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.output, *graph.value_info)
        if value.type.tensor_type.HasField("shape")
    }


def attributes(node: NodeProto | None) -> dict[str, Any]:
    """A node's attributes by name, bytes as text."""
    from onnx import helper

    found = {} if node is None else {each.name: helper.get_attribute_value(each) for each in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}


def replace_nodes(model: ModelProto, replacements: Mapping[str, list[NodeProto]]) -> None:
    """Puts nodes in the place of those whose first output is named, and drops what nothing depends on then."""
    graph = model.graph
    nodes = [new for node in graph.node for new in replacements.get(node.output[0], [node])]
    set_nodes(model, nodes)


def set_nodes(model: ModelProto, nodes: list[NodeProto]) -> None:
    """Gives the graph `nodes`, but for those that no output depends on."""
    from onnx import helper

    graph = model.graph
    wanted = {output.name for output in graph.output}
    needed = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            needed.append(node)
            wanted.update(node.input)
    del graph.node[:]
    graph.node.extend(needed[::-1])
    if CONTRIB not in {each.domain for each in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(CONTRIB, 1))
