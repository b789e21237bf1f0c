"""Attention as one operator of ONNX Runtime's own, com.microsoft.MultiHeadAttention.

An exported graph spells attention out, with a matrix of tokens by tokens for each head in memory: at 512x512 a gigabyte for
each row of Stable Diffusion 1.5. The operator computes it in tiles (Dao et al., arXiv:2205.14135) in a few megabytes.

    query, key, value = Transpose(Reshape(x))        (B, L, H * D) -> (B, H, L, D)
    keys              = Reshape(Transpose(Reshape(key)))            -> (B, H, D, M)
    scores            = MatMul(Mul(query, s), Mul(keys, s))
    y                 = Reshape(Transpose(MatMul(Softmax(scores), value)))      (B, L, H * D)
becomes
    y                 = MultiHeadAttention(x_query, x_key, x_value)             H heads, scale s * s

Attention with a mask, as in a text encoder, is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from diffuserve.graphs.graph_index import CONTRIB, GraphIndex, attributes, replace_nodes

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

_HEADS_FIRST = [0, 2, 1, 3]


def fuse_attention(model: ModelProto) -> int:
    """Changes the graph.

    Returns:
        How many attentions were fused.
    """
    fused = {node.output[0]: [node] for node in _Matcher(model.graph).replacements()}
    if fused:
        replace_nodes(model, fused)
    return len(fused)


class _Matcher:
    """Finds the pattern from its softmax outwards."""

    def __init__(self, graph: GraphProto) -> None:
        self._graph = GraphIndex(graph)

    def replacements(self) -> Iterator[NodeProto]:
        """A node for each match, with the output of the last node that it replaces."""
        for node in self._graph.nodes:
            if node.op_type == "Softmax" and (replacement := self._replacement(node)) is not None:
                yield replacement

    def _replacement(self, softmax: NodeProto) -> NodeProto | None:
        from onnx import helper

        graph = self._graph
        scores = graph.made_by("MatMul", softmax.input[0])
        weighted = graph.only_consumer("MatMul", softmax.output[0])
        if scores is None or weighted is None:
            return None
        queries, keys = (self._scaled(name) for name in scores.input)
        if queries is None or keys is None:
            return None
        tokens = [
            self._split_heads(queries[0]),
            self._split_heads(self._untransposed(keys[0])),
            self._split_heads(weighted.input[1]),
        ]
        transposed = graph.only_consumer("Transpose", weighted.output[0])
        last = graph.only_consumer("Reshape", transposed.output[0]) if transposed else None
        heads = {each[1] for each in tokens if each is not None}
        if None in tokens or len(heads) != 1 or last is None or attributes(transposed).get("perm") != _HEADS_FIRST:
            return None
        return helper.make_node(
            "MultiHeadAttention",
            [each[0] for each in tokens if each is not None],
            list(last.output),
            name=f"{last.output[0]}.attention",
            domain=CONTRIB,
            num_heads=heads.pop(),
            scale=queries[1] * keys[1],
        )

    def _scaled(self, name: str) -> tuple[str, float] | None:
        """What a multiplication by a constant is of, and the constant."""
        product = self._graph.made_by("Mul", name)
        if product is None:
            return None
        factor = self._graph.numbers(product.input[1])
        return (product.input[0], factor[0]) if factor is not None and len(factor) == 1 else None

    def _untransposed(self, name: str) -> str:
        """The keys before the exporter turned (B, H, M, D) to (B, H, D, M), which takes it two reshapes."""
        for operator in ("Reshape", "Transpose", "Reshape"):
            node = self._graph.made_by(operator, name)
            if node is None or (operator == "Transpose" and attributes(node).get("perm") != [0, 2, 1]):
                return ""
            name = node.input[0]
        return name

    def _split_heads(self, name: str) -> tuple[str, int] | None:
        """The tokens (B, L, H * D) that (B, H, L, D) was made of, and H."""
        transposed = self._graph.made_by("Transpose", name)
        split = self._graph.made_by("Reshape", transposed.input[0]) if transposed else None
        if transposed is None or split is None or attributes(transposed).get("perm") != _HEADS_FIRST:
            return None
        heads = self._third_of_four(split.input[1])
        return (split.input[0], heads) if heads is not None else None

    def _third_of_four(self, name: str) -> int | None:
        """Of a shape, which is a constant where it is known or else put together."""
        shape = self._graph.made_by("Concat", name)
        if shape is None:
            sizes = self._graph.numbers(name)
            return int(sizes[2]) if sizes is not None and len(sizes) == 4 else None
        size = self._graph.numbers(shape.input[2]) if len(shape.input) == 4 else None
        return int(size[0]) if size is not None else None
