"""Group normalisation, with the SiLU after it, as one operator of ONNX Runtime's own, com.microsoft.GroupNorm, which has a
kernel on NVIDIA GPUs only.

    groups     = Reshape(x, (0, G, -1))                             (B, C, h, w) -> (B, G, C / G * h * w)
    normalised = InstanceNormalization(groups, ones, zeros)
    y          = Add(Mul(Reshape(normalised, Shape(x)), gamma), beta)
    z          = Mul(y, Sigmoid(y))                                 where nothing else takes y
becomes
    z          = GroupNorm(x, gamma, beta)                          G groups, activation 1

In a graph in 16 bits there are casts around the normalisation. The operator sums in fp32 whatever the type of `x`, and takes
gamma and beta in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffuserve.graphs.graph_index import CONTRIB, GraphIndex, Shape, attributes, replace_nodes

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


def fuse_group_norm(model: ModelProto, shapes: Mapping[str, Shape]) -> int:
    """Changes the graph. What it makes has its channels first, which the operator's kernel does not take: see
    `diffuserve.graphs.channels_last`.

    Args:
        model: is changed.
        shapes: of the values, by name, where they are known.

    Returns:
        How many normalisations were fused.
    """
    matcher = _Matcher(GraphIndex(model.graph), shapes)
    fused = {
        nodes[-1].output[0]: nodes
        for node in model.graph.node
        if node.op_type == "InstanceNormalization" and (nodes := matcher.replacement(node))
    }
    if fused:
        replace_nodes(model, fused)
    return len(fused)


class _Matcher:
    def __init__(self, graph: GraphIndex, shapes: Mapping[str, Shape]) -> None:
        self._graph, self._shapes = graph, shapes

    def replacement(self, norm: NodeProto) -> list[NodeProto]:
        """The nodes in the place of a normalisation, the last with the output of the last one that it replaces; none if
        it is part of something else."""
        graph = self._graph
        split = graph.made_by("Reshape", self._before_cast(norm.input[0]))
        scales, biases = graph.numbers(norm.input[1]), graph.numbers(norm.input[2])
        if split is None or scales is None or biases is None or set(scales) != {1.0} or set(biases) != {0.0}:
            return []
        root, groups = split.input[0], len(scales)
        joined = graph.only_consumer("Reshape", self._after_cast(norm.output[0]))
        shape = graph.made_by("Shape", joined.input[1]) if joined else None
        if (
            joined is None
            or shape is None
            or graph.numbers(split.input[1]) != [0, groups, -1]
            or shape.input[0] != root
            or attributes(shape).get("start", 0) != 0
            or "end" in attributes(shape)
            or len(self._shapes.get(root, ())) != 4
        ):
            return []
        scaled, gamma = self._with_channels("Mul", joined.output[0])
        shifted, beta = self._with_channels("Add", scaled.output[0]) if scaled else (None, "")
        if shifted is None:
            return []
        channels = (graph.constant_dims(gamma) or (0,))[0]
        # Two channels at a time, which must not be of two groups.
        if (graph.constant_dims(beta) or (0,))[0] != channels or channels % (2 * groups):
            return []
        silu = self._silu(shifted.output[0])
        return self._nodes(
            root, gamma, beta, groups, attributes(norm).get("epsilon", 1e-5), silu or shifted, bool(silu)
        )

    def _before_cast(self, name: str) -> str:
        cast = self._graph.made_by("Cast", name)
        return cast.input[0] if cast else name

    def _after_cast(self, name: str) -> str:
        cast = self._graph.only_consumer("Cast", name)
        return cast.output[0] if cast else name

    def _with_channels(self, operator: str, name: str) -> tuple[NodeProto | None, str]:
        """The operation on the value and a number for each of its channels, and the name of these."""
        node = self._graph.only_consumer(operator, name)
        if node is None:
            return None, ""
        (other,) = [each for each in node.input if each != name] or [""]
        dims = self._graph.constant_dims(other)
        return (node, other) if dims is not None and len(dims) == 3 and dims[1:] == (1, 1) else (None, "")

    def _silu(self, name: str) -> NodeProto | None:
        """The multiplication by the own sigmoid, if nothing else takes the value."""
        consumers = {node.op_type: node for node in self._graph.consumers(name)}
        if len(self._graph.consumers(name)) != 2 or set(consumers) != {"Sigmoid", "Mul"} or name in self._graph.outputs:
            return None
        product = self._graph.only_consumer("Mul", consumers["Sigmoid"].output[0])
        return product if product is not None and name in product.input else None

    def _nodes(
        self, root: str, gamma: str, beta: str, groups: int, epsilon: float, last: NodeProto, silu: bool
    ) -> list[NodeProto]:
        from onnx import TensorProto, helper

        output, nodes, flat = last.output[0], [], f"{last.output[0]}.flat"
        nodes.append(helper.make_node("Constant", [], [flat], name=flat, value_ints=[-1]))
        for name in (gamma, beta):
            nodes.append(helper.make_node("Reshape", [name, flat], [f"{output}.{name}"], name=f"{output}.{name}"))
            single = f"{output}.{name}.fp32"
            nodes.append(helper.make_node("Cast", [f"{output}.{name}"], [single], name=single, to=TensorProto.FLOAT))
        norm = helper.make_node(
            "GroupNorm",
            [root, f"{output}.{gamma}.fp32", f"{output}.{beta}.fp32"],
            [output],
            name=f"{output}.group_norm",
            domain=CONTRIB,
            groups=groups,
            epsilon=epsilon,
            activation=int(silu),
            channels_last=0,
        )
        return [*nodes, norm]
