"""A graph as ONNX Runtime runs it fastest on NVIDIA GPUs: with its own operators for what Stable Diffusion consists of.

ONNX Runtime's own tool for it (`onnxruntime.transformers`, model type "unet") makes the same operators. It finds nothing of
graphs in fp16 but the convolutions, has no pattern for feed-forwards as PyTorch 2 exports them, and turns values round before
and after nearly every operator that it makes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffuserve.graphs.channels_last import move_channels_last
from diffuserve.graphs.fused_attention import fuse_attention
from diffuserve.graphs.fused_group_norm import fuse_group_norm
from diffuserve.graphs.fused_split_gelu import fuse_split_gelu
from diffuserve.graphs.graph_index import inferred_shapes

if TYPE_CHECKING:
    from onnx import ModelProto


def fuse_for_cuda(model: ModelProto) -> None:
    """Changes the graph, whose weights may lie in another file; inputs and outputs stay as they are. The CPU has no kernels
    for what it makes."""
    shapes = inferred_shapes(model)  # now, since they cannot be told of what the fusions make
    fuse_attention(model)
    fuse_split_gelu(model, shapes)
    fuse_group_norm(model, shapes)
    move_channels_last(model, shapes)
