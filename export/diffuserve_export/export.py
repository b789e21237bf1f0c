"""A checkpoint to a bundle: export, comparison with PyTorch, manifest."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from diffuserve import __version__
from diffuserve.bundle import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Component,
    File,
    Manifest,
    describe_file,
    read_manifest,
    sha256_of_files,
    verify,
    write_manifest,
)
from diffuserve.errors import BundleError
from diffuserve.tensors import STAGES, TEXT_ENCODER, VAE_ENCODER, stage_specs
from diffuserve_export.checkpoint import Checkpoint, open_checkpoint
from diffuserve_export.load import LoadedModel, model_from_checkpoint
from diffuserve_export.onnx import onnx_from_module
from diffuserve_export.parity import parity_of_onnx
from diffuserve_export.preview import preview_from_vae_encoder
from diffuserve_export.quiet import quiet
from diffuserve_export.staging import staged

# Raised whenever this package writes other graphs from the same checkpoint, so that existing bundles are made anew.
_EXPORTER_REVISION = "2"
# StableDiffusionPipeline sets these whatever the checkpoint's file says.
_PIPELINE_SCHEDULER_SETTINGS = {"steps_offset": 1, "clip_sample": False}
_PACKAGES = ("diffusers", "numpy", "onnx", "onnxruntime", "onnxscript", "torch", "transformers")

# Called with what is about to be done; the work is done within the context that it returns.
Progress = Callable[[str], AbstractContextManager[None]]


def _silent(title: str) -> AbstractContextManager[None]:
    return nullcontext()


def bundle_from_checkpoint(
    checkpoint: Path | Checkpoint, output: Path, *, force: bool = False, progress: Progress = _silent
) -> Path:
    """Exports a checkpoint, unless `output` already is its bundle.

    Args:
        checkpoint: a folder in diffusers' format, or an opened one.
        output: the bundle's folder. An older bundle there is replaced once the new one is complete.
        force: export even if nothing has changed.
        progress: called with what is about to be done, for a context manager around it.

    Returns:
        `output`.

    Raises:
        CheckpointError: the checkpoint is not supported or damaged, or the export differs from PyTorch.
        BundleError: `output` is something other than a bundle.
    """
    if isinstance(checkpoint, Path):
        checkpoint = open_checkpoint(checkpoint)
    _check_output(output)
    if not force and unchanged_manifest(checkpoint, output) is not None:
        return output
    with staged(output) as folder:
        with progress("load"):
            model = model_from_checkpoint(checkpoint)
        _write_bundle(checkpoint, model, folder, progress)
    return output


def unchanged_manifest(checkpoint: Checkpoint, output: Path) -> Manifest | None:
    """The manifest of the bundle `output`, if an export would write the same again and its files are undamaged."""
    try:
        manifest = read_manifest(output)
        if (
            manifest.format_version == FORMAT_VERSION
            and manifest.model == checkpoint.spec
            and manifest.versions == _versions()
            and manifest.source_sha256 == checkpoint.sha256
        ):
            verify(output, manifest)
            return manifest
    except BundleError:
        pass  # there is none, or it is damaged: it is made anew
    return None


def _check_output(output: Path) -> None:
    if output.exists() and not (output / MANIFEST_NAME).is_file() and (output.is_file() or any(output.iterdir())):
        raise BundleError(
            f"{output} exists and is not a bundle, so it is not replaced. Remove it, or name another --output."
        )


def _write_bundle(checkpoint: Checkpoint, model: LoadedModel, folder: Path, progress: Progress) -> None:
    from diffuserve_export.modules import modules_from_model

    spec = checkpoint.spec
    tensors = stage_specs(
        max_tokens=spec.max_tokens, hidden_size=spec.hidden_size, latent_channels=spec.latent_channels
    )
    modules = modules_from_model(model)
    components = {}
    for stage in STAGES:
        path = folder / stage / "model.onnx"
        path.parent.mkdir()
        with progress(f"export {stage}"):
            onnx_from_module(modules[stage], stage, spec, path)
        with progress(f"compare {stage}"):
            tolerance, parity = parity_of_onnx(path, modules[stage], stage, spec, modules[TEXT_ENCODER])
        files = [path, *sorted(file for file in path.parent.iterdir() if file != path)]
        components[stage] = Component(
            engine="onnxruntime",
            precision="fp32",
            files=tuple(describe_file(folder, file) for file in files),
            tensors=tensors[stage],
            tolerance=tolerance,
            parity=parity,
        )
    with progress("fit preview"):
        preview = preview_from_vae_encoder(modules[VAE_ENCODER], spec)
    files_beside = _write_files_beside(checkpoint, model, folder)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        model=spec,
        scheduler={**checkpoint.configs["scheduler"], **_PIPELINE_SCHEDULER_SETTINGS},
        components=components,
        files=files_beside,
        preview=preview,
        unet_seconds={},
        source=spec.name,
        source_sha256=checkpoint.sha256,
        bundle_sha256=sha256_of_files(
            [*files_beside, *(file for component in components.values() for file in component.files)]
        ),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=_versions(),
    )
    write_manifest(folder, manifest)


def _write_files_beside(checkpoint: Checkpoint, model: LoadedModel, folder: Path) -> tuple[File, ...]:
    """Tokenizer and scheduler. Many checkpoints have the tokenizer only as vocab.json and merges.txt."""
    tokenizer, scheduler = folder / "tokenizer", folder / "scheduler"
    with quiet():
        model.tokenizer.backend_tokenizer.no_truncation()
        model.tokenizer.backend_tokenizer.no_padding()
        model.tokenizer.save_pretrained(tokenizer)
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    config.pop("name_or_path", None)
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in tokenizer.iterdir():
        if file.name not in ("tokenizer.json", "tokenizer_config.json"):
            file.unlink()
    scheduler.mkdir()
    shutil.copyfile(checkpoint.path / "scheduler" / "scheduler_config.json", scheduler / "scheduler_config.json")
    return tuple(describe_file(folder, file) for parent in (tokenizer, scheduler) for file in sorted(parent.iterdir()))


def _versions() -> dict[str, str]:
    """What a bundle depends on besides its checkpoint."""
    return {
        "diffuserve": __version__,
        "exporter": _EXPORTER_REVISION,
        "python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
    }
