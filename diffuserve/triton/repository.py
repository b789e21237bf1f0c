"""Whether a model repository can be served: every folder a model that `assemble` has finished, and all of one bundle."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from diffuserve.bundle.manifest import MANIFEST_NAME
from diffuserve.errors import BundleError, LaunchError
from diffuserve.tensors import STABLE_DIFFUSION
from diffuserve.triton.configuration import CONFIG_NAME, check_stages, read_options
from diffuserve.triton.placement import described_placement, read_placement

_VERSION = "1"


def check_repository(repository: Path) -> None:
    """Checks it before Triton is started.

    Raises:
        LaunchError: it is missing, empty or a bundle, or a folder in it is not a model.
        BundleError: a model is incomplete or has changed, or they are of several bundles.
        ConfigurationError: an option is unknown or not allowed, or the stages are configured for others.
    """
    if not repository.is_dir():
        raise LaunchError(
            f"The model repository {repository} does not exist. Make it: diffuserve assemble BUNDLE --output {repository}"
        )
    models = sorted(folder for folder in repository.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    if (repository / MANIFEST_NAME).is_file():
        raise LaunchError(
            f"{repository} is a bundle, and no model repository. Make one of it: diffuserve assemble {repository}, which "
            "then says how to serve it."
        )
    if not models:
        raise LaunchError(
            f"The model repository {repository} is empty. Fill it: diffuserve assemble BUNDLE --output {repository}"
        )
    for folder in models:
        if not (folder / CONFIG_NAME).is_file():
            raise LaunchError(
                f"{folder} is not a model: it has no {CONFIG_NAME}. Triton takes every folder of a repository for a model, so "
                "move it elsewhere."
            )
        read_placement(folder / _VERSION)
    check_one_bundle(repository, (folder.name for folder in models))
    if (repository / STABLE_DIFFUSION).is_dir():
        check_stages(repository, *read_options(repository))


def check_one_bundle(repository: Path, names: Iterable[str], version: str = _VERSION) -> None:
    """Compares the bundles that models were assembled from, as far as they lie in this repository: Triton may serve
    several. Stages of another bundle would draw other images, or none.

    Raises:
        BundleError: one was not finished, or they differ; it names the folders.
    """
    folders = [repository / name for name in sorted({STABLE_DIFFUSION, *names}) if (repository / name).is_dir()]
    bundles = {folder.name: described_placement(folder / version).bundle_sha256 for folder in folders}
    if len(set(bundles.values())) > 1:
        listed = ", ".join(f"{name} of {sha256[:10]}" for name, sha256 in bundles.items())
        raise BundleError(
            f"The models in {repository} are of different bundles: {listed}. Assemble the repository again: diffuserve "
            f"assemble BUNDLE --output {repository}"
        )
