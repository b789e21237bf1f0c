"""The gated feed-forward of a UNet's transformers as one operator of ONNX Runtime's own, com.microsoft.BiasSplitGelu, which has
a kernel on NVIDIA GPUs only.

    left, right = Split(Add(x, bias))               (B, L, D) -> twice (B, L, D / 2)
    y           = Mul(left, Gelu(right))            exact, not the approximation by tanh
becomes
    y           = BiasSplitGelu(x, bias)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffuserve.graphs.graph_index import CONTRIB, GraphIndex, Shape, attributes, replace_nodes

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

# The widths D that the kernel takes: those of Stable Diffusion.
_WIDTHS = (2560, 5120, 10240)


def fuse_split_gelu(model: ModelProto, shapes: Mapping[str, Shape]) -> int:
    """Changes the graph.

    Args:
        model: is changed.
        shapes: of the values, by name, where they are known.

    Returns:
        How many were fused.
    """
    graph = GraphIndex(model.graph)
    fused = {
        node.output[0]: [node]
        for gelu in model.graph.node
        if gelu.op_type == "Gelu" and (node := _replacement(graph, gelu, shapes)) is not None
    }
    if fused:
        replace_nodes(model, fused)
    return len(fused)


def _replacement(graph: GraphIndex, gelu: NodeProto, shapes: Mapping[str, Shape]) -> NodeProto | None:
    from onnx import helper

    split = graph.made_by("Split", gelu.input[0])
    product = graph.only_consumer("Mul", gelu.output[0])
    if split is None or product is None or attributes(gelu).get("approximate", "none") != "none":
        return None
    left = split.output[0]
    halves = len(split.output) == 2 and len(split.input) == 1 and split.output[1] == gelu.input[0]
    added = graph.made_by("Add", split.input[0])
    if not halves or added is None or left not in product.input or attributes(split).get("axis") not in (2, -1):
        return None
    for x, bias in (tuple(added.input), tuple(added.input)[::-1]):
        dims = graph.constant_dims(bias)
        if dims is not None and len(dims) == 1 and dims[0] in _WIDTHS and len(shapes.get(x, ())) == 3:
            return helper.make_node(
                "BiasSplitGelu",
                [x, bias],
                list(product.output),
                name=f"{product.output[0]}.split_gelu",
                domain=CONTRIB,
            )
    return None
