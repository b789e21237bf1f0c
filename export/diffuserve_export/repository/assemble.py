"""A bundle to a Triton model repository.

triton_repo/
    unet/config.pbtxt           written from the manifest
    unet/1/model.py             a few lines that import the class from the package, for the Python backend only
    unet/1/model.onnx           the bundle's file, linked where the file system allows, else copied
    unet/1/*.onnxruntime/       what the engine has compiled of it on this machine, so that the first start is a fast one
    unet/1/placement.json       what was placed; written last, so a folder without it is incomplete
    stable_diffusion/1/...      manifest.json and tokenizer/ instead of an engine

A repository may hold several bundles under names of their own: NAME/ beside NAME_unet/ and the other stages.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from diffuserve.bundle.checksums import verify
from diffuserve.bundle.file_samples import sample_file
from diffuserve.bundle.manifest import MANIFEST_NAME, Component, Manifest, read_manifest
from diffuserve.engines import ENGINES
from diffuserve.engines.compiled_cache import compiled_beside
from diffuserve.engines.tensorrt_profiles import check_limits
from diffuserve.errors import BundleError, ConfigurationError
from diffuserve.files import write_whole
from diffuserve.images.safety import refuse_without_safety_checker
from diffuserve.limits import Limits
from diffuserve.serving_options import Serving
from diffuserve.tensors import SAFETY_CHECKER, STABLE_DIFFUSION
from diffuserve.triton.configuration import CONFIG_NAME, read_stage_models
from diffuserve.triton.placement import PLACEMENT_NAME, VERSION, Placement, write_placement
from diffuserve.triton.stage_models import check_model_name, inflight_models, stage_model
from diffuserve_export.repository.triton_backends import PYTHON
from diffuserve_export.repository.triton_config import (
    INFLIGHT_MODEL_PY,
    STAGE_MODEL_PY,
    configs_from_manifest,
    given_arguments,
    sources,
    text_from_config,
)


def repository_from_bundle(
    bundle: Path,
    output: Path,
    limits: Limits | None = None,
    serving: Serving | None = None,
    *,
    backend: str = PYTHON,
    name: str = STABLE_DIFFUSION,
) -> Manifest:
    """Verifies every checksum of the bundle, then writes or refreshes the models below `output`.

    A safety checker that an earlier bundle of the same name had and this one lacks is removed. Other folders of `output` are
    left alone, but Triton takes each of them for a model.

    Args:
        bundle: its folder.
        output: the repository.
        limits: what is accepted; by default the model's own.
        serving: how it is served.
        backend: of Triton, for the stages; one of `diffuserve_export.repository.triton_backends.BACKENDS`.
        name: of the model that requests name; those of its stages follow from it.

    Raises:
        BundleError: the bundle is damaged or lacks the safety checker that `serving` requires, the backend does not run
            one of its engines, `name` cannot be a model's, `output` holds something else than models or a model of another
            name with the same folders, or it cannot be written.
        ConfigurationError: the limits allow what the bundle's TensorRT plans were not built for.
    """
    serving = serving or Serving()
    manifest = read_manifest(bundle)
    limits = limits or Limits.for_model(manifest.model)
    if serving.require_safety_checker:
        refuse_without_safety_checker(manifest)
    components = {stage_model(check_model_name(name), stage): each for stage, each in manifest.components.items()}
    checker = stage_model(name, SAFETY_CHECKER)
    check_limits(limits, manifest)
    check_output(output, name, {name, checker, *components})
    verify(bundle, manifest)
    head = sources(manifest, given_arguments(manifest.model, limits, serving, backend, name))
    try:
        for model, config in configs_from_manifest(manifest, limits, serving, backend, name=name).items():
            folder = output / model / VERSION
            folder.mkdir(parents=True, exist_ok=True)
            (folder / PLACEMENT_NAME).unlink(missing_ok=True)
            _write(output / model / CONFIG_NAME, text_from_config(config, head))
            if config.backend == PYTHON:
                _write(folder / "model.py", INFLIGHT_MODEL_PY if model == name else STAGE_MODEL_PY)
            else:
                (folder / "model.py").unlink(missing_ok=True)
            component = components.get(model)
            if component is not None:
                # Weights beside an .onnx file are found by their names relative to it.
                first = bundle / component.files[0].path
                placed = [
                    _place(bundle / file.path, folder / (bundle / file.path).relative_to(first.parent))
                    for file in component.files
                ]
                _place_compiled(first, component, folder)
            else:
                paths = [
                    MANIFEST_NAME,
                    *(file.path for file in manifest.files if file.path.startswith("tokenizer")),
                ]
                placed = [_place(bundle / path, folder / path) for path in paths]
            files = tuple(sample_file(folder, path) for path in placed)
            write_placement(folder, Placement(manifest.model, manifest.bundle_sha256, component, files))
        if not manifest.has_safety_checker and (output / checker / VERSION / PLACEMENT_NAME).is_file():
            shutil.rmtree(output / checker)
    except OSError as error:
        raise BundleError(f"The repository {output} cannot be written: {error}") from error
    return manifest


def check_output(output: Path, name: str, folders: Collection[str]) -> None:
    """Looks at what the repository holds already, before the model `name` is put into `folders`.

    Raises:
        BundleError: it cannot be read or holds something else than models of Triton, one of the folders belongs to a model of
            another name, or a model would be named as a stage of another is.
    """
    try:
        if output.is_file():
            raise BundleError(f"{output} is a file. Name a folder with --output.")
        paths = sorted(output.iterdir()) if output.is_dir() else []
    except OSError as error:
        raise BundleError(f"The repository {output} cannot be read: {error.strerror}.") from error
    inflight = {name}
    for path in paths:
        if path.name.startswith("."):
            continue
        if not (path.is_dir() and (path.name in folders or (path / CONFIG_NAME).is_file())):
            raise BundleError(
                f"{output} exists and is not a model repository: it holds {path.name}, which is not a model. Name another --output."
            )
        if path.name == name:
            continue
        stages: dict[str, str] = {}
        with suppress(ConfigurationError):  # what cannot be read is not served either
            stages = read_stage_models(output, path.name)
        if stages:
            inflight.add(path.name)
        if stages and (taken := {path.name, *stages.values()}.intersection(folders)):
            raise BundleError(
                f"The model {name} would replace {' and '.join(sorted(taken))} in {output}, which the model {path.name} needs. "
                "Choose another --name or --output."
            )
    # Clients tell in-flight models from stages by their names alone.
    if hidden := inflight.difference(inflight_models({*folders, *(path.name for path in paths)})):
        raise BundleError(
            f"The name {sorted(hidden)[0]} would be taken for that of a stage of another model in {output}, so requests could not "
            "find it. Choose another --name or --output."
        )


def _write(path: Path, text: str) -> None:
    """Writes a file, unless it has the same text already: it then keeps its time."""
    if path.is_file() and path.read_text() == text:
        return
    write_whole(path, text.encode())


def _place_compiled(first: Path, component: Component, folder: Path) -> None:
    """Places what the component's engine has compiled of it, in the stead of what was compiled of an earlier bundle."""
    entries = {entry.name: entry for entry in compiled_beside(first, component)}
    for engine in ENGINES:
        for old in folder.glob(f"*.{engine}"):
            if old.name not in entries:
                shutil.rmtree(old)
    for name, entry in entries.items():
        for file in entry.iterdir():
            _place(file, folder / name / file.name)


def _place(source: Path, target: Path) -> Path:
    """Links `source` to `target`, or copies it where it cannot be linked."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    try:
        os.link(source, aside)
    except OSError:
        shutil.copy2(source, aside)
    # Renaming one name of a file onto another name of the same file does nothing and leaves both.
    aside.replace(target)
    aside.unlink(missing_ok=True)
    return target
