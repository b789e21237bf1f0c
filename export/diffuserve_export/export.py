"""A checkpoint to a bundle: export, comparison with PyTorch, manifest."""

from __future__ import annotations

import gc
import json
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from diffuserve import __version__
from diffuserve.bundle.checksums import describe_file, sha256_of_files, verify
from diffuserve.bundle.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Component,
    File,
    Manifest,
    Preview,
    ReferenceImage,
    read_manifest,
    write_manifest,
)
from diffuserve.errors import BundleError, CheckpointError, StageFailed
from diffuserve.tensors import TEXT_ENCODER, VAE_ENCODER
from diffuserve.trials.image_parity import image_parity
from diffuserve_export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from diffuserve_export.checkpoint.load import model_from_checkpoint
from diffuserve_export.checkpoint.loaded_model import LoadedModel
from diffuserve_export.checkpoint.model_spec import stages_that_overflow_in_fp16
from diffuserve_export.graphs.onnx import onnx_from_module
from diffuserve_export.parity import parity_of_onnx, random_input_ids, references_of
from diffuserve_export.preview import preview_from_vae_encoder
from diffuserve_export.quiet import quiet
from diffuserve_export.reference_image import reference_from_model
from diffuserve_export.room import check_room
from diffuserve_export.staging import staged

# Raised whenever this package writes other graphs from the same checkpoint, so that existing bundles are made anew.
_EXPORTER_REVISION = "7"
_PACKAGES = ("diffusers", "numpy", "onnx", "onnxruntime", "onnxscript", "torch", "transformers")

# Called with what is about to be done; the work is done within the context that it returns.
Progress = Callable[[str], AbstractContextManager[None]]


def _silent(title: str) -> AbstractContextManager[None]:
    return nullcontext()


def bundle_from_checkpoint(
    checkpoint: Path | Checkpoint,
    output: Path,
    *,
    force: bool = False,
    strict: bool = True,
    progress: Progress = _silent,
) -> Path:
    """Exports a checkpoint, unless `output` already is its bundle.

    Args:
        checkpoint: what `open_checkpoint` takes, or what it returned.
        output: the bundle's folder. An older bundle there is replaced once the new one is complete.
        force: export even if nothing has changed.
        strict: whether to fail where a component or the reference image differs from PyTorch's by more than its
            tolerance, or the image is of one colour. The figures are in the manifest in either case.
        progress: called with what is about to be done, for a context manager around it.

    Returns:
        `output`.

    Raises:
        CheckpointError: the checkpoint is not supported or damaged, makes values that are not finite, or the export
            differs from PyTorch.
        BundleError: `output` is something other than a bundle, or cannot be written; or there is too little memory.
    """
    if isinstance(checkpoint, Path):
        checkpoint = open_checkpoint(checkpoint)
    check_output(output)
    if not force and unchanged_manifest(checkpoint, output) is not None:
        return output
    try:
        with staged(output) as folder:
            check_room(checkpoint, folder)
            _write_bundle(checkpoint, folder, progress, strict)
    except OSError as error:
        raise BundleError(f"{output} cannot be written: {error}. No bundle was written.") from error
    return output


def unchanged_manifest(checkpoint: Checkpoint, output: Path) -> Manifest | None:
    """The manifest of the bundle `output`, if an export would write the same again and its files are undamaged."""
    try:
        manifest = read_manifest(output)
        if (
            manifest.format_version == FORMAT_VERSION
            and manifest.model == checkpoint.spec
            and manifest.scheduler == msgspec.json.decode(msgspec.json.encode(checkpoint.configs["scheduler"]))
            and manifest.source == checkpoint.source
            and manifest.safety_checker_left_out == checkpoint.safety_checker_left_out
            and manifest.versions == _versions()
            and manifest.loras == checkpoint.fused_loras
            and manifest.source_sha256 == checkpoint.sha256
            and manifest.checkpoint_sha256 == checkpoint.file_sha256
        ):
            verify(output, manifest)
            return manifest
    except BundleError:
        pass  # there is none, or it is damaged: it is made anew
    return None


def check_output(output: Path) -> None:
    """Raises BundleError if `output` is something that a bundle must not replace."""
    if output.exists() and not (output / MANIFEST_NAME).is_file() and (output.is_file() or any(output.iterdir())):
        raise BundleError(
            f"{output} exists and is not a bundle, so it is not replaced. Remove it, or name another --output."
        )


def _write_bundle(checkpoint: Checkpoint, folder: Path, progress: Progress, strict: bool) -> None:
    """Stage by stage. A module's weights are given up as soon as its graph is written, so that never more than one stage
    is in memory twice."""
    from diffuserve_export.graphs.modules import modules_from_model

    spec, tensors = checkpoint.spec, checkpoint.tensors
    overflowing = stages_that_overflow_in_fp16(checkpoint.configs)
    with progress("load"):
        model = model_from_checkpoint(checkpoint)
    with progress("draw reference"):
        reference = reference_from_model(checkpoint, model, folder, strict=strict)
    files_beside = (*write_files_beside(checkpoint, model, folder), reference.file)
    texts = random_input_ids(tuple(model.tokenizers.values()), tensors[TEXT_ENCODER])
    modules = modules_from_model(model, spec)
    del model
    components = {}
    for stage in tensors:
        path = folder / stage / "model.onnx"
        path.parent.mkdir()
        with progress(f"export {stage}"):
            onnx_from_module(modules[stage], stage, tensors[stage], spec, path)
        with progress(f"compare {stage}"):
            references = references_of(modules[stage], stage, tensors[stage], spec, texts)
            if stage == TEXT_ENCODER:
                texts = references[-1].outputs
            if stage == VAE_ENCODER:
                preview = preview_from_vae_encoder(modules[stage], spec)
            del modules[stage]
            gc.collect()  # modules refer to themselves
            files = [path, *sorted(file for file in path.parent.iterdir() if file != path)]
            component = Component(
                engine="onnxruntime",
                precision="fp32",
                files=tuple(describe_file(folder, file) for file in files),
                tensors=tensors[stage],
                tolerance=0.0,
                parity=(),
                overflows_in_fp16=stage in overflowing,
            )
            tolerance, parity = parity_of_onnx(path, component, references, f"{stage} of {spec.name}", strict=strict)
            components[stage] = msgspec.structs.replace(component, tolerance=tolerance, parity=parity)
    manifest = manifest_from_parts(checkpoint, components, files_beside, preview, reference)
    write_manifest(folder, manifest)
    with progress("compare images"):
        try:
            image = image_parity(folder, manifest, components)
        except StageFailed as error:
            raise CheckpointError(
                f"The export of {spec.name} draws no image: {error} No bundle was written."
            ) from error
    if strict and not image.passed:
        raise CheckpointError(
            f"{spec.name} draws another image than diffusers: {image}. No bundle was written; --allow-differences writes it "
            "anyway."
        )
    write_manifest(folder, msgspec.structs.replace(manifest, images=(image,)))


def manifest_from_parts(
    checkpoint: Checkpoint,
    components: dict[str, Component],
    files: tuple[File, ...],
    preview: Preview,
    reference: ReferenceImage,
) -> Manifest:
    """The manifest of a bundle that has just been made.

    Args:
        checkpoint: what it was made from.
        components: by stage.
        files: those beside the components'.
        preview: of its latents.
        reference: what diffusers draws with it.
    """
    return Manifest(
        format_version=FORMAT_VERSION,
        model=checkpoint.spec,
        scheduler=checkpoint.configs["scheduler"],
        components=components,
        files=files,
        preview=preview,
        reference=reference,
        images=(),
        unet_seconds={},
        source=checkpoint.source,
        source_sha256=checkpoint.sha256,
        bundle_sha256=sha256_of_files(
            [*files, *(file for component in components.values() for file in component.files)]
        ),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=_versions(),
        image_processor=checkpoint.image_processor,
        safety_checker_left_out=checkpoint.safety_checker_left_out,
        loras=checkpoint.fused_loras,
        checkpoint_sha256=checkpoint.file_sha256,
        exported_with=checkpoint.exported_with,
    )


def write_files_beside(checkpoint: Checkpoint, model: LoadedModel, folder: Path) -> tuple[File, ...]:
    """Tokenizers, and the scheduler's settings as they are used."""
    for part, tokenizer in model.tokenizers.items():
        _write_tokenizer(tokenizer, folder / part)
    scheduler = folder / "scheduler"
    scheduler.mkdir()
    (scheduler / "scheduler_config.json").write_text(json.dumps(checkpoint.configs["scheduler"], indent=2) + "\n")
    parents = [*(folder / part for part in model.tokenizers), scheduler]
    return tuple(describe_file(folder, file) for parent in parents for file in sorted(parent.iterdir()))


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json. Many checkpoints have only vocab.json and merges.txt instead."""
    with quiet():
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("name_or_path", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in folder.iterdir():
        if file.name not in ("tokenizer.json", "tokenizer_config.json"):
            file.unlink()


def _versions() -> dict[str, str]:
    """What a bundle depends on besides its checkpoint."""
    return {
        "diffuserve": __version__,
        "exporter": _EXPORTER_REVISION,
        "python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
    }
