"""The same models served with other settings: a copy of a repository, its big files linked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from diffuserve.errors import LaunchError
from diffuserve.tensors import STABLE_DIFFUSION


def repository_with(repository: Path, folder: Path, parameters: Mapping[str, str]) -> Path:
    """Copies an assembled repository to `folder` and sets parameters of its in-flight model.

    Args:
        repository: made by `diffuserve assemble`; it is left as it is.
        folder: must not exist yet.
        parameters: new values of parameters that the model has already.

    Returns:
        `folder`.

    Raises:
        LaunchError: the repository cannot be read, or has no such parameter.
    """
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    source = repository / STABLE_DIFFUSION / "config.pbtxt"
    try:
        config = text_format.Parse(source.read_text(), ModelConfig())
    except (OSError, text_format.ParseError) as error:
        raise LaunchError(f"{source} cannot be read: {error}. Write it again: diffuserve assemble BUNDLE") from error
    for name, value in parameters.items():
        if name not in config.parameters:
            known = ", ".join(sorted(config.parameters))
            raise LaunchError(f"{source} has no parameter {name!r}; it has {known}. Assemble it again.")
        config.parameters[name].string_value = value
    shutil.copytree(repository, folder, copy_function=_link_or_copy, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    target = folder / STABLE_DIFFUSION / "config.pbtxt"
    target.unlink()  # it is a link to the source
    # Protobuf's text format leaves out zeros, but Triton reads a missing max_batch_size as unset.
    target.write_text(text_format.MessageToString(config) + "max_batch_size: 0\n")
    return folder


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)
