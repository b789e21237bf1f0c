"""A checkpoint as it is, run by PyTorch: a bundle that needs no export, for `diffuserve archive`.

bundle/
    manifest.json               as of an exported bundle; its components name no files
    tokenizer/ scheduler/       likewise
    checkpoint/                 what of the checkpoint is read, in diffusers' format

It is a fallback for models that cannot be exported: eager PyTorch is slower than every engine.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffuserve.bundle.checksums import describe_file
from diffuserve.bundle.manifest import Component, Manifest, write_manifest
from diffuserve.errors import CheckpointError
from diffuserve.stages import Engine
from diffuserve.tensors import VAE_ENCODER, StageSpec
from diffuserve_export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from diffuserve_export.checkpoint.load import model_from_checkpoint
from diffuserve_export.export import manifest_from_parts, write_files_beside
from diffuserve_export.preview import preview_from_vae_encoder
from diffuserve_export.reference_image import reference_from_model

if TYPE_CHECKING:
    from torch import nn

ENGINE = "torch"
_FOLDER = "checkpoint"
_TEXTS = (".json", ".txt")


def eager_bundle_from_checkpoint(path: Path, folder: Path) -> Manifest:
    """Writes the bundle into `folder`, which exists and is empty.

    Raises:
        CheckpointError: the checkpoint is not supported, damaged, or no folder in diffusers' format.
    """
    from diffuserve_export.graphs.modules import modules_from_model

    checkpoint = open_checkpoint(path)
    if checkpoint.single_file:
        raise CheckpointError(f"{path} is a single file; only folders are archived without an export. Export it first.")
    model = model_from_checkpoint(checkpoint)
    modules = modules_from_model(model, checkpoint.spec)
    copied = _copy_checkpoint(checkpoint, folder / _FOLDER)
    reference = reference_from_model(checkpoint, model, folder)
    files = (
        *write_files_beside(checkpoint, model, folder),
        *(describe_file(folder, file) for file in copied),
        reference.file,
    )
    components = {
        stage: Component(ENGINE, "fp32", (), tensors, tolerance=0.0, parity=())
        for stage, tensors in checkpoint.tensors.items()
    }
    preview = preview_from_vae_encoder(modules[VAE_ENCODER], checkpoint.spec)
    manifest = manifest_from_parts(checkpoint, components, files, preview, reference)
    write_manifest(folder, manifest)
    return manifest


def eager_engines(bundle: Path, manifest: Manifest) -> dict[str, Engine]:
    """Every stage on PyTorch, on the CPU in fp32; for the handler of such an archive."""
    from diffuserve_export.graphs.modules import modules_from_model

    checkpoint = replace(open_checkpoint(bundle / _FOLDER), spec=manifest.model)
    modules = modules_from_model(model_from_checkpoint(checkpoint), manifest.model)
    return {stage: _ModuleEngine(module, manifest.components[stage].tensors) for stage, module in modules.items()}


class _ModuleEngine:
    """Implements `diffuserve.stages.Engine`."""

    def __init__(self, module: nn.Module, tensors: StageSpec) -> None:
        self._module = module
        self._outputs = [spec.name for spec in tensors.outputs]

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        import torch

        with torch.inference_mode():
            outputs = self._module(**{name: torch.from_numpy(np.array(array)) for name, array in inputs.items()})
        tensors = outputs if isinstance(outputs, tuple) else (outputs,)
        return {name: tensor.numpy() for name, tensor in zip(self._outputs, tensors, strict=True)}


def _copy_checkpoint(checkpoint: Checkpoint, target: Path) -> list[Path]:
    """The configs, tokenizers and weights that are read; returns the copies."""
    texts = [file for file in checkpoint.path.iterdir() if file.suffix == ".json"]
    texts += [
        file for part in checkpoint.configs for file in (checkpoint.path / part).iterdir() if file.suffix in _TEXTS
    ]
    weights = [file for part in checkpoint.weights.values() for file in part.files]
    copies = []
    for file in sorted({*texts, *weights}):
        copy = target / file.relative_to(checkpoint.path)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        copies.append(copy)
    return copies
