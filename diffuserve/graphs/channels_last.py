"""Images with their channels last, as the tensor cores of NVIDIA GPUs want them.

Convolutions become com.microsoft.NhwcConv, and normalisations `fuse_group_norm`'s with the channels last. What lies between
them, operations on each element for itself, joins of channels and enlargements, is done on the channels-last values too, so
that a value is turned round only where a graph needs the other order: for a UNet its input and its output.

    B, C, h, w  ->  B, h, w, C      Transpose, perm 0 2 3 1
    B, h, w, C  ->  B, C, h, w      Transpose, perm 0 3 1 2
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffuserve.graphs.graph_index import CONTRIB, GraphIndex, Shape, attributes, set_nodes

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_TO_LAST, _TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]
_ELEMENTWISE = frozenset(
    "Abs Add And Cast Clip Div Erf Exp Gelu Identity IsInf IsNaN Mul Neg Not Or Relu Round Sigmoid Sqrt Sub Tanh".split()  # noqa: SIM905 - names
)
_REDUCTIONS = frozenset({"ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"})


def move_channels_last(model: ModelProto, shapes: Mapping[str, Shape]) -> None:
    """Changes the graph; its inputs and outputs stay as they are.

    Args:
        model: is changed.
        shapes: of the values, by name, where they are known.
    """
    rewriter = _Rewriter(model, shapes)
    for node in list(model.graph.node):
        rewriter.add(node)
    for output in model.graph.output:
        rewriter.first(output.name)
    set_nodes(model, rewriter.nodes)


class _Rewriter:
    """Takes the nodes in their order and makes others. A value is there as it was, with its channels last, or both."""

    def __init__(self, model: ModelProto, shapes: Mapping[str, Shape]) -> None:
        self.nodes: list[NodeProto] = []
        self._graph = GraphIndex(model.graph)
        self._shapes = shapes
        self._last: dict[str, str] = {}  # the name of a value with its channels last
        self._only_last: set[str] = set()  # values that are not there as they were
        self._flat: dict[str, str] = {}  # constants of a number for each channel, as vectors
        self._same: dict[str, str] = {}  # a value that is another one, by the graph's name for it

    def add(self, node: NodeProto) -> None:
        """Adds what does the same as `node`."""
        done = False
        if node.op_type == "Conv":
            done = self._convolve(node)
        elif node.op_type == "GroupNorm" and node.domain == CONTRIB:
            self._emit(node, [self.last(node.input[0]), *node.input[1:]], channels_last=1)
            done = True
        elif node.op_type == "Transpose":
            done = self._transpose(node)
        elif node.op_type == "Shape":
            done = self._shape(node)
        elif any(name in self._last for name in node.input):
            done = self._between(node)
        if not done:
            for at, name in enumerate(node.input):
                node.input[at] = self.first(name)
            self.nodes.append(node)

    def first(self, name: str) -> str:
        """The value as it was."""
        if name in self._only_last:
            self._only_last.remove(name)
            self._add("Transpose", [self._last[name]], name, perm=_TO_FIRST)
        if name in self._same and name in self._graph.outputs:
            self._add("Identity", [self._same.pop(name)], name)
        return self._same.get(name, name)

    def last(self, name: str) -> str:
        """The value with its channels last."""
        if name not in self._last:
            source, target = self.first(name), f"{name}.last"
            if self._shapes.get(name, ())[2:] == (1, 1):  # a number for each channel: nothing moves in memory
                self._add("Reshape", [source, self._constant(f"{target}.shape", [0, 1, 1, -1])], target)
            else:
                self._add("Transpose", [source], target, perm=_TO_LAST)
            self._last[name] = target
        return self._last[name]

    def _convolve(self, node: NodeProto) -> bool:
        weights = self._graph.constant_dims(node.input[1])
        if weights is None or len(weights) != 4 or attributes(node).get("group", 1) != 1:
            return False
        turned = self._add("Transpose", [node.input[1]], f"{node.output[0]}.weights", perm=_TO_LAST)
        self._emit(node, [self.last(node.input[0]), turned, *node.input[2:]], operator="NhwcConv", domain=CONTRIB)
        return True

    def _transpose(self, node: NodeProto) -> bool:
        """One that turns a value round itself."""
        source, target, perm = node.input[0], node.output[0], attributes(node).get("perm")
        if perm == _TO_LAST and source in self._last:
            self._same[target] = self._last[source]
            return True
        if perm == _TO_FIRST:
            self._last[target] = self.first(source)
            self._only_last.add(target)
            return True
        return False

    def _shape(self, node: NodeProto) -> bool:
        """Of a value that is there with its channels last only, without turning it round."""
        source = node.input[0]
        if source not in self._only_last:
            return False
        start, end = attributes(node).get("start", 0), attributes(node).get("end")
        positions = _TO_FIRST[slice(start, end)]
        sizes = self._add("Shape", [self._last[source]], f"{node.output[0]}.last")
        picked = self._constant(f"{node.output[0]}.positions", positions)
        self._add("Gather", [sizes, picked], node.output[0])
        return True

    def _between(self, node: NodeProto) -> bool:
        """An operation of which an input has its channels last already."""
        if node.op_type in _ELEMENTWISE:
            inputs = [self._operand(name) for name in node.input]
            if None in inputs:
                return False
            self._emit(node, [name for name in inputs if name is not None])
            return True
        if self._rank(node.input[0]) != 4:
            return False
        if node.op_type == "Concat" and attributes(node).get("axis") in (1, -3):
            self._emit(node, [self.last(name) for name in node.input], axis=3)
            return True
        if node.op_type == "Resize":
            return self._resize(node)
        if node.op_type in _REDUCTIONS and len(node.input) == 2:
            # Of a whole row the order does not matter.
            axes = self._graph.numbers(node.input[1])
            if axes is not None and {axis % 4 for axis in axes} == {1, 2, 3}:
                node.input[0] = self.last(node.input[0])
                self.nodes.append(node)
                return True
        return False

    def _operand(self, name: str) -> str | None:
        """What stands for an operand where the other one has its channels last; None if nothing can."""
        if not name or name in self._last:
            return self._last.get(name, name)
        dims = self._graph.constant_dims(name)
        if dims is None:
            rank = self._rank(name)
            return self.first(name) if rank == 0 else self.last(name) if rank == 4 else None
        if all(side == 1 for side in dims):
            return name
        if len(dims) in (3, 4) and dims[-2:] == (1, 1) and all(side == 1 for side in dims[:-3]):
            if name not in self._flat:
                shape = self._constant(f"{name}.flat.shape", [-1])
                self._flat[name] = self._add("Reshape", [name, shape], f"{name}.flat")
            return self._flat[name]
        return None

    def _rank(self, name: str) -> int | None:
        """None where it is not known."""
        return len(self._shapes[name]) if name in self._shapes else None

    def _resize(self, node: NodeProto) -> bool:
        scales = self._graph.numbers(node.input[2]) if len(node.input) == 3 else None
        if scales is None or len(scales) != 4 or attributes(node).get("mode", "nearest") != "nearest":
            return False
        turned = self._constant(f"{node.output[0]}.scales", [scales[at] for at in _TO_LAST])
        self._emit(node, [self.last(node.input[0]), "", turned])
        return True

    def _emit(self, node: NodeProto, inputs: list[str], operator: str = "", domain: str = "", **changes: Any) -> None:
        """Adds a node whose output has its channels last."""
        from onnx import helper

        target = node.output[0]
        self._last[target] = f"{target}.last"
        self._only_last.add(target)
        made = helper.make_node(
            operator or node.op_type, inputs, [self._last[target]], name=node.name, domain=domain or node.domain
        )
        made.attribute.extend(each for each in node.attribute if each.name not in changes)
        made.attribute.extend(helper.make_attribute(name, value) for name, value in changes.items())
        self.nodes.append(made)

    def _add(self, operator: str, inputs: list[str], output: str, **values: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(operator, inputs, [output], name=f"{output}.{operator}", **values))
        return output

    def _constant(self, name: str, numbers: list[Any]) -> str:
        kind = "value_floats" if isinstance(numbers[0], float) else "value_ints"
        return self._add("Constant", [], name, **{kind: numbers})
