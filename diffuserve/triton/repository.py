"""Whether a model repository can be served: every folder a model that `assemble` has finished, and all of one bundle."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffuserve.bundle.manifest import MANIFEST_NAME
from diffuserve.errors import BundleError, ConfigurationError, LaunchError
from diffuserve.limits import Limits
from diffuserve.serving_options import Serving, limits_and_serving
from diffuserve.tensors import STABLE_DIFFUSION
from diffuserve.triton.placement import described_placement, read_placement

CONFIG_NAME = "config.pbtxt"
_VERSION = "1"


def check_repository(repository: Path) -> None:
    """Checks it before Triton is started.

    Raises:
        LaunchError: it is missing, empty or a bundle, or a folder in it is no model.
        BundleError: a model is incomplete or has changed, or they are of several bundles.
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
                f"{folder} is no model: it has no {CONFIG_NAME}. Triton takes every folder of a repository for a model, so "
                "move it elsewhere."
            )
        read_placement(folder / _VERSION)
    check_one_bundle(repository, (folder.name for folder in models))


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


def read_options(repository: Path) -> tuple[Limits, Serving]:
    """What the in-flight model's config.pbtxt says.

    Raises:
        BundleError: nothing was assembled here.
        ConfigurationError: the file is missing or cannot be parsed, or a parameter is unknown or not allowed.
    """
    model = described_placement(repository / STABLE_DIFFUSION / _VERSION).model
    config = read_config(repository / STABLE_DIFFUSION)
    try:
        return limits_and_serving(model, {name: each.string_value for name, each in config.parameters.items()})
    except ConfigurationError as error:
        raise ConfigurationError(f"{repository / STABLE_DIFFUSION / CONFIG_NAME}: {error}") from None


def read_config(model_folder: Path) -> Any:
    """A model's config.pbtxt as protobuf's `ModelConfig`.

    Raises:
        ConfigurationError: the file is missing or cannot be parsed.
    """
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    path = model_folder / CONFIG_NAME
    try:
        return text_format.Parse(path.read_text(), ModelConfig())
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise ConfigurationError(
            f"{path} cannot be read: {error}. Write it again: diffuserve assemble BUNDLE"
        ) from error
