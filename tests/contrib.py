"""ONNX Runtime's own operators spelt out in ONNX's, after the former's documentation, so that a CPU can run what has kernels on
GPUs only."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import TensorProto, helper

from diffuserve.graphs.graph_index import CONTRIB


def spelt_out(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same with no GroupNorm, NhwcConv and BiasSplitGelu; MultiHeadAttention runs on a CPU."""
    spelt = onnx.ModelProto()
    spelt.CopyFrom(model)
    nodes: list[onnx.NodeProto] = []
    for number, node in enumerate(model.graph.node):
        writer = _Writer(nodes, f"spelt.{number}")
        given = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        if node.domain != CONTRIB or node.op_type == "MultiHeadAttention":
            nodes.append(node)
        elif node.op_type == "GroupNorm":
            writer.group_norm(node, given)
        elif node.op_type == "NhwcConv":
            writer.convolution(node, given)
        elif node.op_type == "BiasSplitGelu":
            writer.split_gelu(node)
        else:
            raise AssertionError(f"What does {node.op_type} do?")
    del spelt.graph.node[:]
    spelt.graph.node.extend(nodes)
    return spelt


class _Writer:
    def __init__(self, nodes: list[onnx.NodeProto], prefix: str) -> None:
        self._nodes, self._prefix = nodes, prefix

    def _add(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"{self._prefix}.{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def _numbers(self, *numbers: int) -> str:
        return self._add("Constant", value_ints=list(numbers))

    def group_norm(self, node: onnx.NodeProto, given: dict[str, Any]) -> None:
        """y = gamma * (x - mean) / sqrt(variance + epsilon) + beta, over the pixels and the channels of each group, summed in
        fp32; activation 1 is SiLU. Only the layout that the kernel has."""
        assert given.keys() == {"groups", "epsilon", "activation", "channels_last"}
        assert given["channels_last"] == 1
        x, gamma, beta = node.input
        single = self._add("Cast", x, to=TensorProto.FLOAT)
        shape = self._add("Shape", single)
        first = self._add("Transpose", single, perm=[0, 3, 1, 2])
        grouped = self._add("Reshape", first, self._numbers(0, given["groups"], -1))
        centred = self._add("Sub", grouped, self._add("ReduceMean", grouped, self._numbers(2)))
        variance = self._add("ReduceMean", self._add("Mul", centred, centred), self._numbers(2))
        epsilon = self._add("Constant", value_float=given["epsilon"])
        deviation = self._add("Sqrt", self._add("Add", variance, epsilon))
        sizes = self._add("Gather", shape, self._numbers(0, 3, 1, 2))
        last = self._add(
            "Transpose", self._add("Reshape", self._add("Div", centred, deviation), sizes), perm=[0, 2, 3, 1]
        )
        y = self._add("Add", self._add("Mul", last, gamma), beta)
        if given["activation"]:
            y = self._add("Mul", y, self._add("Sigmoid", y))
        self._add("CastLike", y, x, output=node.output[0])

    def convolution(self, node: onnx.NodeProto, given: dict[str, Any]) -> None:
        """x is (B, h, w, C), and the weights (M, kh, kw, C)."""
        first = self._add("Transpose", node.input[0], perm=[0, 3, 1, 2])
        weights = self._add("Transpose", node.input[1], perm=[0, 3, 1, 2])
        y = self._add("Conv", first, weights, *node.input[2:], **given)
        self._add("Transpose", y, perm=[0, 2, 3, 1], output=node.output[0])

    def split_gelu(self, node: onnx.NodeProto) -> None:
        """The left half times the exact GELU of the right one, after the bias."""
        added = self._add("Add", *node.input)
        half = self._add("Div", self._add("Shape", added, start=2), self._numbers(2))
        zero, axis = self._numbers(0), self._numbers(2)
        left = self._add("Slice", added, zero, half, axis)
        right = self._add("Slice", added, half, self._add("Mul", half, self._numbers(2)), axis)
        self._add("Mul", left, self._add("Gelu", right), output=node.output[0])
