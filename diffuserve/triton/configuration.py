"""What a repository's config.pbtxt files say, and whether they go together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from diffuserve.errors import ConfigurationError
from diffuserve.limits import Limits, max_batch_sizes
from diffuserve.options import check_known, from_parameters
from diffuserve.serving_options import Serving, limits_and_serving
from diffuserve.tensors import STABLE_DIFFUSION, UNET
from diffuserve.triton.parameters import without_tritons_own
from diffuserve.triton.placement import VERSION, described_placement
from diffuserve.triton.stage_models import split_parameters

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


def read_stage_models(repository: Path, name: str) -> dict[str, str]:
    """The Triton model of each stage that a model calls, by stage; empty if it is not an in-flight model.

    Raises:
        ConfigurationError: its config.pbtxt is missing or cannot be parsed.
    """
    stage_models, _ = split_parameters(_parameters(read_config(repository / name)))
    return stage_models


def read_options(repository: Path, name: str = STABLE_DIFFUSION) -> tuple[Limits, Serving]:
    """What an in-flight model's config.pbtxt says.

    Raises:
        BundleError: nothing was assembled here.
        ConfigurationError: the file is missing or cannot be parsed, or a parameter is unknown or not allowed.
    """
    model = described_placement(repository / name / VERSION).model
    return _from_parameters(
        repository / name,
        read_config(repository / name),
        lambda parameters: limits_and_serving(model, split_parameters(parameters)[1]),
    )


def check_one_instance(repository: Path, name: str) -> None:
    """Raises ConfigurationError if an in-flight model is to run in several processes: each would have a loop of its own, and
    they would not share calls."""
    count = _instances(read_config(repository / name))
    if count != 1:
        raise ConfigurationError(
            f"{repository / name / CONFIG_NAME}: the number of instances is {count}; an in-flight model runs in 1. For more UNet "
            "calls at a time: diffuserve assemble BUNDLE --unet-instances N"
        )


def check_stages(
    repository: Path, name: str, stage_models: Mapping[str, str], limits: Limits, serving: Serving
) -> None:
    """Compares what an in-flight model will ask of its stages with their own configurations, as far as they lie in this
    repository: Triton may serve several.

    Args:
        repository: the folder.
        name: of the in-flight model.
        stage_models: the Triton model of each stage.
        limits: what is accepted.
        serving: how it is served.

    Raises:
        ConfigurationError: a stage takes fewer rows, runs fewer calls at a time, or ends itself sooner, or has a parameter that
            is unknown or not allowed.
    """
    rows = max_batch_sizes(limits)
    for stage, model in stage_models.items():
        folder = repository / model
        if not folder.is_dir():
            continue
        config = read_config(folder)
        check_at_least = partial(_check_at_least, folder, name)
        check_at_least("max_batch_size", config.max_batch_size, rows[stage])
        if stage == UNET:
            check_at_least("number of instances", _instances(config), serving.unet_instances)
        if config.backend == "python":  # models of Triton's other backends are not ours, nor are their parameters
            options = _from_parameters(folder, config, _stage_options)
            check_at_least(_CALL_TIMEOUT, options.call_timeout_s, serving.call_timeout_s)


def _instances(config: Any) -> int:
    """Processes that Triton runs a model in: a group's count is for each of its GPUs."""
    return sum(group.count * max(1, len(group.gpus)) for group in config.instance_group)


def _stage_options(parameters: Mapping[str, str]) -> Serving:
    """What a stage's process reads of its parameters."""
    check_known(parameters, [_CALL_TIMEOUT])
    return from_parameters(Serving(), parameters)


def _check_at_least(folder: Path, name: str, what: str, found: float, asked: float) -> None:
    if found < asked:
        raise ConfigurationError(
            f"{folder / CONFIG_NAME}: the {what} is {found:g}, and {name} is configured for {asked:g}. Set both "
            "by assembling the repository again; see its options: diffuserve assemble --help"
        )


def _parameters(config: Any) -> dict[str, str]:
    """Ours."""
    return without_tritons_own({name: each.string_value for name, each in config.parameters.items()})


def _from_parameters(folder: Path, config: Any, read: Callable[[dict[str, str]], Read]) -> Read:
    """What `read` makes of a configuration's parameters; its errors name the file."""
    try:
        return read(_parameters(config))
    except ConfigurationError as error:
        raise ConfigurationError(f"{folder / CONFIG_NAME}: {error}") from None
