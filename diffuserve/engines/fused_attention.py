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

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

_DOMAIN = "com.microsoft"
_HEADS_FIRST = [0, 2, 1, 3]


def fuse_attention(model: ModelProto) -> int:
    """Changes the graph.

    Returns:
        How many attentions were fused.
    """
    from onnx import helper

    graph = model.graph
    fused = {node.output[0]: node for node in _Matcher(graph).replacements()}
    if fused:
        nodes = _needed([fused.get(node.output[0], node) for node in graph.node], graph)
        del graph.node[:]
        graph.node.extend(nodes)
        if _DOMAIN not in {each.domain for each in model.opset_import}:
            model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    return len(fused)


def _needed(nodes: list[NodeProto], graph: GraphProto) -> list[NodeProto]:
    """The nodes that an output depends on."""
    wanted = {output.name for output in graph.output}
    needed = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            needed.append(node)
            wanted.update(node.input)
    return needed[::-1]


class _Matcher:
    """Finds the pattern from its softmax outwards."""

    def __init__(self, graph: GraphProto) -> None:
        self._nodes = list(graph.node)
        self._producer = {name: node for node in self._nodes for name in node.output}
        self._consumers: dict[str, list[NodeProto]] = {}
        for node in self._nodes:
            for name in node.input:
                self._consumers.setdefault(name, []).append(node)
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._constants = {node.output[0]: node for node in self._nodes if node.op_type == "Constant"}

    def replacements(self) -> Iterator[NodeProto]:
        """A node for each match, with the output of the last node that it replaces."""
        for node in self._nodes:
            if node.op_type == "Softmax" and (replacement := self._replacement(node)) is not None:
                yield replacement

    def _replacement(self, softmax: NodeProto) -> NodeProto | None:
        from onnx import helper

        scores = self._made_by("MatMul", softmax.input[0])
        weighted = self._only_consumer("MatMul", softmax.output[0])
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
        transposed = self._only_consumer("Transpose", weighted.output[0])
        last = self._only_consumer("Reshape", transposed.output[0]) if transposed else None
        heads = {each[1] for each in tokens if each is not None}
        if None in tokens or len(heads) != 1 or last is None or _perm(transposed) != _HEADS_FIRST:
            return None
        return helper.make_node(
            "MultiHeadAttention",
            [each[0] for each in tokens if each is not None],
            list(last.output),
            name=f"{last.output[0]}.attention",
            domain=_DOMAIN,
            num_heads=heads.pop(),
            scale=queries[1] * keys[1],
        )

    def _scaled(self, name: str) -> tuple[str, float] | None:
        """What a multiplication by a constant is of, and the constant."""
        product = self._made_by("Mul", name)
        if product is None:
            return None
        factor = self._numbers(product.input[1])
        return (product.input[0], factor[0]) if factor is not None and len(factor) == 1 else None

    def _untransposed(self, name: str) -> str:
        """The keys before the exporter turned (B, H, M, D) to (B, H, D, M), which takes it two reshapes."""
        for operator in ("Reshape", "Transpose", "Reshape"):
            node = self._made_by(operator, name)
            if node is None or (operator == "Transpose" and _perm(node) != [0, 2, 1]):
                return ""
            name = node.input[0]
        return name

    def _split_heads(self, name: str) -> tuple[str, int] | None:
        """The tokens (B, L, H * D) that (B, H, L, D) was made of, and H."""
        transposed = self._made_by("Transpose", name)
        split = self._made_by("Reshape", transposed.input[0]) if transposed else None
        if transposed is None or split is None or _perm(transposed) != _HEADS_FIRST:
            return None
        heads = self._third_of_four(split.input[1])
        return (split.input[0], heads) if heads is not None else None

    def _third_of_four(self, name: str) -> int | None:
        """Of a shape, which is a constant where it is known or else put together."""
        shape = self._made_by("Concat", name)
        if shape is None:
            sizes = self._numbers(name)
            return int(sizes[2]) if sizes is not None and len(sizes) == 4 else None
        size = self._numbers(shape.input[2]) if len(shape.input) == 4 else None
        return int(size[0]) if size is not None else None

    def _made_by(self, operator: str, name: str) -> NodeProto | None:
        node = self._producer.get(name)
        return node if node is not None and node.op_type == operator else None

    def _only_consumer(self, operator: str, name: str) -> NodeProto | None:
        consumers = self._consumers.get(name, [])
        return consumers[0] if len(consumers) == 1 and consumers[0].op_type == operator else None

    def _numbers(self, name: str) -> list[float] | None:
        """A small constant's values."""
        from onnx import numpy_helper

        if name in self._initializers:
            return [float(value) for value in numpy_helper.to_array(self._initializers[name]).ravel()]
        if name in self._constants:
            (attribute,) = self._constants[name].attribute
            if attribute.name == "value":
                return [float(value) for value in numpy_helper.to_array(attribute.t).ravel()]
        return None


def _perm(node: NodeProto | None) -> list[int]:
    if node is None:
        return []
    return next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), [])
