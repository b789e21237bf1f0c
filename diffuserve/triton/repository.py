"""Whether a model repository can be served: each folder in it is a model that `assemble` has finished, each in-flight model has
its stages, and these are of its own bundle."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from diffuserve.bundle.manifest import MANIFEST_NAME
from diffuserve.errors import BundleError, LaunchError
from diffuserve.tensors import STABLE_DIFFUSION
from diffuserve.triton.configuration import (
    CONFIG_NAME,
    check_one_instance,
    check_stages,
    read_config,
    read_options,
    read_stage_models,
)
from diffuserve.triton.placement import VERSION, described_placement, read_placement


def check_repository(repository: Path) -> tuple[str, ...]:
    """Checks it before Triton is started.

    Returns:
        The names of its in-flight models, sorted.

    Raises:
        LaunchError: it is missing, empty or a bundle, or a folder in it is not a model, or not one that is used.
        BundleError: a model is incomplete or has changed, or a stage is missing or of another bundle than its in-flight model.
        ConfigurationError: an option is unknown or not allowed, or the stages are configured for others.
    """
    if not repository.is_dir():
        raise LaunchError(
            f"The model repository {repository} does not exist. Make it: diffuserve assemble BUNDLE --output {repository}"
        )
    folders = sorted(folder for folder in repository.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    if (repository / MANIFEST_NAME).is_file():
        raise LaunchError(
            f"{repository} is a bundle, and no model repository. Make one of it: diffuserve assemble {repository}, which "
            "then says how to serve it."
        )
    if not folders:
        raise LaunchError(
            f"The model repository {repository} is empty. Fill it: diffuserve assemble BUNDLE --output {repository}"
        )
    for folder in folders:
        if not (folder / CONFIG_NAME).is_file():
            raise LaunchError(
                f"{folder} is not a model: it has no {CONFIG_NAME}. Triton takes every folder of a repository for a model, so "
                "move it elsewhere."
            )
        read_placement(folder / VERSION)
        if read_config(folder).backend == "python" and not (folder / VERSION / "model.py").is_file():
            raise BundleError(
                f"{folder / VERSION / 'model.py'} is missing. Assemble the repository again: diffuserve assemble BUNDLE "
                f"--output {repository}"
            )
    return _check_models(repository, [folder.name for folder in folders])


def check_serves(repository: Path, model: str) -> None:
    """Raises LaunchError if no in-flight model of the repository has this name, and as `check_repository`."""
    models = check_repository(repository)
    if model not in models:
        raise LaunchError(f"{repository} does not serve the model {model!r}. It serves: {', '.join(models)}.")


def _check_models(repository: Path, names: Iterable[str]) -> tuple[str, ...]:
    unused = set(names)
    inflight = {name: models for name in sorted(unused) if (models := read_stage_models(repository, name))}
    for name, models in inflight.items():
        check_one_bundle(repository, name, models.values())
        unused -= {name, *models.values()}
        for stage, model in models.items():
            if not (repository / model).is_dir():
                raise BundleError(
                    f"{repository / model} is missing, which {name} calls. Assemble it again: {_assemble(repository, name)}"
                )
            _check_is_stage(repository, name, stage, model)
        check_one_instance(repository, name)
        check_stages(repository, name, models, *read_options(repository, name))
    if unused:
        raise LaunchError(
            f"No model of {repository} calls {', '.join(sorted(unused))}, and Triton would load them nevertheless. Delete "
            f"or move them, or assemble their bundle again: diffuserve assemble BUNDLE --output {repository}"
        )
    return tuple(inflight)


def _check_is_stage(repository: Path, name: str, stage: str, model: str) -> None:
    component = described_placement(repository / model / VERSION).component
    placed = component.files[0].path.partition("/")[0] if component else "an in-flight model"
    if placed != stage:
        raise BundleError(
            f"{name} in {repository} calls {model} for its {stage}, and that is {placed}. Assemble it again: "
            f"{_assemble(repository, name)}"
        )


def check_one_bundle(repository: Path, name: str, stages: Iterable[str], version: str = VERSION) -> None:
    """Compares the bundle of an in-flight model with those of its stages, as far as they lie in this repository: Triton may
    serve several. Stages of another bundle would draw other images, or none.

    Args:
        repository: the folder.
        name: of the in-flight model.
        stages: the Triton models that it calls.
        version: the folder of each model that is served.

    Raises:
        BundleError: one was not finished, or they differ; it names the folders.
    """
    folders = [repository / model for model in sorted({name, *stages}) if (repository / model).is_dir()]
    bundles = {folder.name: described_placement(folder / version).bundle_sha256 for folder in folders}
    if len(set(bundles.values())) > 1:
        listed = ", ".join(f"{model} of {sha256[:10]}" for model, sha256 in bundles.items())
        raise BundleError(
            f"{name} in {repository} and its stages are of different bundles: {listed}. Assemble it again: "
            f"{_assemble(repository, name)}"
        )


def _assemble(repository: Path, name: str) -> str:
    """The command, for messages."""
    option = "" if name == STABLE_DIFFUSION else f" --name {name}"
    return f"diffuserve assemble BUNDLE --output {repository}{option}"
