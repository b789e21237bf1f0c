"""A graph with what PyTorch has fast kernels for as one operator each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffuserve.graphs.fused_attention import fuse_attention
from diffuserve.graphs.fused_group_norm import fuse_group_norm
from diffuserve.graphs.graph_index import inferred_shapes

if TYPE_CHECKING:
    from onnx import ModelProto


def fuse_for_torch(model: ModelProto) -> None:
    """Changes the graph, whose weights may lie in another file; inputs and outputs stay as they are."""
    shapes = inferred_shapes(model)
    fuse_attention(model)
    fuse_group_norm(model, shapes)
