"""A stage's PyTorch module to an ONNX graph with dynamic batch, height, width and number of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffuserve.bundle.manifest import ModelSpec
from diffuserve.tensors import (
    HEIGHT,
    LATENT_HEIGHT,
    LATENT_WIDTH,
    NUMPY_DTYPE,
    TOKENS,
    UNET,
    VAE_ENCODER,
    WIDTH,
    StageSpec,
)
from diffuserve_export.quiet import quiet

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.onnx import ONNXProgram

OPSET = 20
# The exporter freezes what it cannot tell from a constant: so a batch of more than one, and a height and a width that
# differ and are not powers of two.
_BATCH, _HEIGHT, _WIDTH = 2, 5, 3
# diffusers' upsampling makes larger batches contiguous first, which changes nothing in a graph. The exporter would find
# this out by itself and trace the module a second time. The graph takes any batch.
_TRACED_BATCH_MAX = 63


def onnx_from_module(module: nn.Module, stage: str, tensors: StageSpec, spec: ModelSpec, path: Path) -> None:
    """Writes `path`, an ONNX file with the stage's tensors; weights above 1.5 GB go beside it, to `path`.data.

    Args:
        module, stage, tensors, spec: as in `program_from_module`.
        path: the .onnx file; its folder exists.
    """
    program = program_from_module(module, stage, tensors, spec)
    with quiet():
        program.save(path)


def program_from_module(module: nn.Module, stage: str, tensors: StageSpec, spec: ModelSpec) -> ONNXProgram:
    """The stage's graph, in memory and optimised by the exporter; its initializers share the module's weights.

    Args:
        module: the stage's, of `modules_from_model`.
        stage: a name of `diffuserve.tensors`.
        tensors: the stage's.
        spec: the model's.
    """
    import torch

    with quiet(), torch.no_grad():
        example, dynamic_shapes = _example(stage, tensors, spec)
        program = torch.onnx.export(
            module,
            kwargs=example,
            dynamo=True,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in tensors.inputs],
            output_names=[tensor.name for tensor in tensors.outputs],
            dynamic_shapes=dynamic_shapes,
            verbose=False,
        )
        if program is None:
            raise RuntimeError("torch.onnx.export gave no program, which it does only without dynamo.")
        _measure_numbers(program)
        _drop_traces(program)
    return program


def _example(stage: str, tensors: StageSpec, spec: ModelSpec) -> tuple[dict[str, Tensor], dict[str, dict[int, Any]]]:
    """Inputs to trace the stage with, and which of their dimensions are dynamic, both by name."""
    import torch
    from torch.export import Dim

    batch, height, width, tokens = Dim("batch", max=_TRACED_BATCH_MAX), Dim("height"), Dim("width"), Dim("tokens")
    # The UNet halves its latents, the VAE's encoder its image, as often as they do.
    multiple = {UNET: spec.size_multiple // spec.vae_scale_factor, VAE_ENCODER: spec.vae_scale_factor}.get(stage, 1)
    tall, wide = (_HEIGHT * multiple, _times(multiple, height)), (_WIDTH * multiple, _times(multiple, width))
    free = {TOKENS: (spec.max_tokens, tokens), LATENT_HEIGHT: tall, LATENT_WIDTH: wide, HEIGHT: tall, WIDTH: wide}
    example: dict[str, Tensor] = {}
    dynamic_shapes: dict[str, dict[int, Any]] = {}
    for tensor in tensors.inputs:
        shape = tensor.shape(_BATCH, {name: length for name, (length, _) in free.items()})
        symbols = {axis: free[dim][1] for axis, dim in enumerate(tensor.dims, 1) if isinstance(dim, str)}
        example[tensor.name] = torch.zeros(shape, dtype=getattr(torch, NUMPY_DTYPE[tensor.dtype]))
        dynamic_shapes[tensor.name] = {0: batch, **symbols}
    return example, dynamic_shapes


def _times(factor: int, dim: Any) -> Any:
    """The multiples of `factor`; the exporter refuses 1 * dim."""
    return factor * dim if factor > 1 else dim


def _measure_numbers(program: ONNXProgram) -> None:
    """Takes the shape of an image from its numbers and not its bytes: all that TensorRT does with bytes is to cast them."""
    from onnxscript import ir

    graph = program.model.graph
    for value in graph.inputs:
        uses = list(value.uses())
        casts = [use.node for use in uses if use.node.op_type == "Cast"]
        if value.dtype == ir.DataType.UINT8 and casts:
            for use in uses:
                if use.node is not casts[0]:
                    use.node.replace_input_with(use.idx, casts[0].outputs[0])
    graph.sort()


def _drop_traces(program: ONNXProgram) -> None:
    """Drops the stack traces of this machine, which the exporter attaches to every node."""
    from onnxscript import ir

    for node in ir.traversal.RecursiveGraphIterator(program.model.graph):
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    program.model.graph.metadata_props.clear()
    for value in (*program.model.graph.inputs, *program.model.graph.initializers.values()):
        value.metadata_props.clear()
