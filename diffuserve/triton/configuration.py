"""What a repository's config.pbtxt files say, and whether they go together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from diffuserve.errors import ConfigurationError
from diffuserve.limits import Limits, max_batch_sizes
from diffuserve.options import from_parameters
from diffuserve.serving_options import Serving, limits_and_serving
from diffuserve.tensors import STABLE_DIFFUSION, UNET
from diffuserve.triton.placement import described_placement

Read = TypeVar("Read")
CONFIG_NAME = "config.pbtxt"
_CALL_TIMEOUT = "call_timeout_s"


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


def read_options(repository: Path) -> tuple[Limits, Serving]:
    """What the in-flight model's config.pbtxt says.

    Raises:
        BundleError: nothing was assembled here.
        ConfigurationError: the file is missing or cannot be parsed, or a parameter is unknown or not allowed.
    """
    model = described_placement(repository / STABLE_DIFFUSION / "1").model
    return _from_parameters(
        repository / STABLE_DIFFUSION,
        read_config(repository / STABLE_DIFFUSION),
        lambda parameters: limits_and_serving(model, parameters),
    )


def check_stages(repository: Path, limits: Limits, serving: Serving) -> None:
    """Compares what the in-flight model will ask of the stages with their own configurations, as far as they lie in this
    repository: Triton may serve several.

    Raises:
        ConfigurationError: a stage takes fewer rows, runs fewer calls at a time, or ends itself sooner.
    """
    for name, rows in max_batch_sizes(limits).items():
        folder = repository / name
        if not folder.is_dir():
            continue
        config = read_config(folder)
        _check_at_least(folder, "max_batch_size", config.max_batch_size, rows)
        if name == UNET:
            instances = sum(group.count * max(1, len(group.gpus)) for group in config.instance_group)
            _check_at_least(folder, "number of instances", instances, serving.unet_instances)
        if _CALL_TIMEOUT in config.parameters:  # only the Python backend's models have it
            stage = _from_parameters(folder, config, lambda parameters: from_parameters(Serving(), parameters))
            _check_at_least(folder, _CALL_TIMEOUT, stage.call_timeout_s, serving.call_timeout_s)


def _check_at_least(folder: Path, what: str, found: float, asked: float) -> None:
    if found < asked:
        raise ConfigurationError(
            f"{folder / CONFIG_NAME}: the {what} is {found:g}, and {STABLE_DIFFUSION} is configured for {asked:g}. Set both "
            "by assembling the repository again; see its options: diffuserve assemble --help"
        )


def _from_parameters(folder: Path, config: Any, read: Callable[[dict[str, str]], Read]) -> Read:
    """What `read` makes of a configuration's parameters; its errors name the file."""
    try:
        return read({name: each.string_value for name, each in config.parameters.items()})
    except ConfigurationError as error:
        raise ConfigurationError(f"{folder / CONFIG_NAME}: {error}") from None
