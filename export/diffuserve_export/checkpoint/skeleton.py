"""A bundle without weights: the graphs that an export of the architecture would write, to measure engines with.

Speed does not depend on what the weights are, only on how many there are. So configs and tokenizers are enough, and a graph
of gigabytes becomes a file of less than one megabyte: each weight is a reference into `model.onnx.data`, which is not
written. `diffuserve bench gpu` fills it with random numbers.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from diffuserve.bundle.checksums import describe_file
from diffuserve.bundle.manifest import Component, File, ModelSpec, Preview, ReferenceImage, write_manifest
from diffuserve_export.checkpoint.checkpoint import Checkpoint
from diffuserve_export.checkpoint.load import empty_modules, tokenizers_from_checkpoint
from diffuserve_export.checkpoint.loaded_model import LoadedModel
from diffuserve_export.checkpoint.model_spec import stages_that_overflow_in_fp16
from diffuserve_export.export import Progress, check_output, manifest_from_parts, write_files_beside
from diffuserve_export.graphs.onnx import program_from_module
from diffuserve_export.quiet import quiet
from diffuserve_export.staging import staged

if TYPE_CHECKING:
    from torch import nn
    from torch.onnx import ONNXProgram

# Of each reference in the data file, so that it can be mapped.
_ALIGNMENT_BYTES = 4096
# Weights' stand-ins: numbers that nothing else in a graph is, each its own, so that no two weights count as the same.
_FIRST_MARK, _MARK_STEP = 5184550 * 2**-23, 2**-23


def skeleton_from_checkpoint(checkpoint: Checkpoint, output: Path, progress: Progress) -> Path:
    """Writes the bundle `output` without weights; an older bundle there is replaced.

    Args:
        checkpoint: its configs and tokenizers are read, and no weights.
        output: the bundle's folder.
        progress: called with what is about to be done, for a context manager around it.

    Returns:
        `output`. Beside what an export writes there are the configs of the UNet and of the VAE, for who wants to build them
        in PyTorch. The reference image is a grey one, and the preview's map gives grey.

    Raises:
        CheckpointError: a tokenizer is missing or damaged.
        BundleError: `output` is something other than a bundle.
    """
    from diffuserve_export.graphs.modules import modules_from_model

    check_output(output)
    with staged(output) as folder, quiet():
        model = _model_of_marks(checkpoint)
        files = (*write_files_beside(checkpoint, model, folder), *_copy_configs(checkpoint.path, folder))
        reference = _grey_image(checkpoint.spec, folder)
        overflowing = stages_that_overflow_in_fp16(checkpoint.configs)
        components = {}
        for stage, module in modules_from_model(model, checkpoint.spec).items():
            with progress(f"export {stage}"):
                tensors = checkpoint.tensors[stage]
                path = folder / stage / "model.onnx"
                path.parent.mkdir(exist_ok=True)
                _save_without_weights(program_from_module(module, stage, tensors, checkpoint.spec), path)
            components[stage] = Component(
                engine="onnxruntime",
                precision="fp32",
                files=(describe_file(folder, path),),
                tensors=tensors,
                tolerance=0.0,
                parity=(),
                overflows_in_fp16=stage in overflowing,
            )
        preview = Preview(((0.0, 0.0, 0.0),) * checkpoint.spec.latent_channels, (0.5, 0.5, 0.5), rmse=0.5)
        manifest = manifest_from_parts(checkpoint, components, (*files, reference.file), preview, reference)
        write_manifest(folder, manifest)
    return output


def _model_of_marks(checkpoint: Checkpoint) -> LoadedModel:
    """The modules, with stand-ins that take no memory in the place of their weights."""
    modules = empty_modules(checkpoint)
    marks = _marks()
    for module in modules.values():
        _mark_weights(module.eval(), marks)
    return LoadedModel(**tokenizers_from_checkpoint(checkpoint), **modules)


def _marks() -> Iterator[float]:
    return (_FIRST_MARK + number * _MARK_STEP for number in itertools.count(1))


def _mark_weights(module: nn.Module, marks: Iterator[float]) -> None:
    """Each parameter becomes one number, seen as often as the parameter has elements."""
    import torch

    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            mark = torch.tensor(next(marks)).expand(weight.shape)
            part.register_parameter(name, torch.nn.Parameter(mark, requires_grad=False))


def _save_without_weights(program: ONNXProgram, path: Path) -> None:
    """Writes the graph, with a reference in the place of each weight, also of one that the exporter has transposed."""
    from onnxscript import ir

    offset = 0
    for value in program.model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and _is_mark(tensor.numpy()):
            value.const_value = ir.ExternalTensor(
                f"{path.name}.data",
                offset,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
            )
            offset += -(-tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    ir.save(program.model, path)


def _is_mark(array: Any) -> bool:
    """Whether an initializer is the stand-in of a weight."""
    if array.dtype != np.float32 or not array.size:
        return False
    number = (float(array.flat[0]) - _FIRST_MARK) / _MARK_STEP
    return 0 < number < 1 << 20 and number.is_integer() and bool((array == array.flat[0]).all())


def _copy_configs(checkpoint: Path, folder: Path) -> list[File]:
    copies = []
    for part in ("unet", "vae"):
        (folder / part).mkdir()
        copies.append(Path(shutil.copyfile(checkpoint / part / "config.json", folder / part / "config.json")))
    return [describe_file(folder, copy) for copy in copies]


def _grey_image(spec: ModelSpec, folder: Path) -> ReferenceImage:
    path = folder / "reference.png"
    Image.new("RGB", (spec.width, spec.height), (127, 127, 127)).save(path)
    return ReferenceImage(
        file=describe_file(folder, path),
        prompt="",
        seed=0,
        steps=spec.default_steps,
        guidance_scale=1.0,
        sampler=spec.default_sampler,
        width=spec.width,
        height=spec.height,
    )
