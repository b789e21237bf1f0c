"""The same models served with other settings: a copy of a repository, its big files linked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from diffuserve.serving_options import limits_and_serving
from diffuserve.tensors import STABLE_DIFFUSION
from diffuserve.triton.configuration import CONFIG_NAME, read_config
from diffuserve.triton.placement import VERSION, described_placement


def repository_with(repository: Path, folder: Path, parameters: Mapping[str, str]) -> Path:
    """Copies an assembled repository to `folder` and sets parameters of its in-flight model.

    Args:
        repository: made by `diffuserve assemble`; it is left as it is.
        folder: must not exist yet.
        parameters: new values by name.

    Returns:
        `folder`.

    Raises:
        BundleError: there is no repository.
        ConfigurationError: its configuration cannot be read, or a parameter is unknown or not allowed.
    """
    from google.protobuf import text_format

    limits_and_serving(described_placement(repository / STABLE_DIFFUSION / VERSION).model, parameters)
    config = read_config(repository / STABLE_DIFFUSION)
    for name, value in parameters.items():
        config.parameters[name].string_value = value
    shutil.copytree(repository, folder, copy_function=_link_or_copy, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    target = folder / STABLE_DIFFUSION / CONFIG_NAME
    target.unlink()  # it is a link to the source
    # Protobuf's text format leaves out zeros, but Triton reads a missing max_batch_size as unset.
    target.write_text(text_format.MessageToString(config) + "max_batch_size: 0\n")
    return folder


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)
