"""A stage's PyTorch module to an ONNX graph with dynamic batch, height, width and number of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffuserve.bundle import ModelSpec
from diffuserve.tensors import TEXT_ENCODER, UNET, VAE_DECODER, VAE_ENCODER, stage_specs
from diffuserve_export.quiet import quiet

if TYPE_CHECKING:
    from torch import Tensor, nn

OPSET = 20
# The exporter freezes what it cannot tell from a constant: so a batch of more than one, and a height and a width that
# differ and are no powers of two.
_BATCH, _HEIGHT, _WIDTH = 2, 5, 3
# diffusers' upsampling makes larger batches contiguous first, which changes nothing in a graph. The exporter would find
# this out by itself and trace the module a second time. The graph takes any batch.
_TRACED_BATCH_MAX = 63


def onnx_from_module(module: nn.Module, stage: str, spec: ModelSpec, path: Path) -> None:
    """Writes `path`, an ONNX file with the stage's tensors; weights above 2 GB go beside it.

    Args:
        module: the stage's, of `modules_from_model`.
        stage: one of `diffuserve.tensors.STAGES`.
        spec: the model's.
        path: the .onnx file; its folder exists.
    """
    import torch

    tensors = stage_specs(
        max_tokens=spec.max_tokens, hidden_size=spec.hidden_size, latent_channels=spec.latent_channels
    )
    with quiet(), torch.no_grad():
        example, dynamic_shapes = _example(stage, spec)
        program = torch.onnx.export(
            module,
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in tensors[stage].inputs],
            output_names=[tensor.name for tensor in tensors[stage].outputs],
            dynamic_shapes=dynamic_shapes,
            verbose=False,
        )
        _drop_traces(program)
        program.save(path)  # type: ignore[union-attr]  # it is None only without dynamo


def _example(stage: str, spec: ModelSpec) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """Inputs to trace the stage with, and which of their dimensions are dynamic."""
    import torch
    from torch.export import Dim

    batch, height, width, tokens = Dim("batch", max=_TRACED_BATCH_MAX), Dim("height"), Dim("width"), Dim("tokens")
    if stage == TEXT_ENCODER:
        return (torch.zeros(_BATCH, spec.max_tokens, dtype=torch.int32),), ({0: batch},)
    if stage == UNET:
        multiple = spec.size_multiple // spec.vae_scale_factor
        sample = torch.zeros(_BATCH, spec.latent_channels, _HEIGHT * multiple, _WIDTH * multiple)
        hidden = torch.zeros(_BATCH, spec.max_tokens, spec.hidden_size)
        return (sample, torch.zeros(_BATCH, 1), hidden), (
            {0: batch, 2: _times(multiple, height), 3: _times(multiple, width)},
            {0: batch},
            {0: batch, 1: tokens},
        )
    if stage == VAE_DECODER:
        return (torch.zeros(_BATCH, spec.latent_channels, _HEIGHT, _WIDTH),), ({0: batch, 2: height, 3: width},)
    if stage == VAE_ENCODER:
        factor = spec.vae_scale_factor
        image = torch.zeros(_BATCH, _HEIGHT * factor, _WIDTH * factor, 3, dtype=torch.uint8)
        return (image,), ({0: batch, 1: _times(factor, height), 2: _times(factor, width)},)
    raise ValueError(f"unknown stage {stage!r}")


def _times(factor: int, dim: Any) -> Any:
    """The multiples of `factor`; the exporter refuses 1 * dim."""
    return factor * dim if factor > 1 else dim


def _drop_traces(program: Any) -> None:
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
