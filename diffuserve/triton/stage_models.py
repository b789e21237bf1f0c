"""The names of Triton's models: one that takes requests, and one for each stage that it calls.

The model that takes requests, the in-flight model, has a parameter for each stage of its bundle in its config.pbtxt, such as
`unet_model`, whose value is the name of the Triton model that runs the stage. So a repository may hold several in-flight
models, each with stages of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from diffuserve.errors import BundleError, ConfigurationError
from diffuserve.tensors import SAFETY_CHECKER, STABLE_DIFFUSION, STAGES

_ALL_STAGES = (*STAGES, SAFETY_CHECKER)
# What is a folder's name, part of a URL, of a metric's label and of a file's name as it is.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def stage_model(name: str, stage: str) -> str:
    """What `assemble` calls the Triton model of one of the stages of the in-flight model `name`."""
    return stage if name == STABLE_DIFFUSION else f"{name}_{stage}"


def inflight_models(names: Iterable[str]) -> list[str]:
    """Of the names of all models that `assemble` has made, those that take requests, sorted."""
    known = set(names)
    stages = {stage_model(name, stage) for name in {STABLE_DIFFUSION, *known} for stage in _ALL_STAGES}
    return sorted(known - stages)


def check_model_name(name: str) -> str:
    """Raises BundleError if it cannot be the name of an in-flight model."""
    if not _NAME.fullmatch(name):
        raise BundleError(
            f"The name {name!r} is not valid for a model. It must have 1 to 64 letters, digits, '_', '-' and '.', and begin with "
            "a letter or a digit."
        )
    return name


def parameters_from_stage_models(models: Mapping[str, str]) -> dict[str, str]:
    """The parameters of the in-flight model that name the Triton model of each stage."""
    return {_parameter(stage): model for stage, model in models.items()}


def split_parameters(parameters: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The reverse, for the parameters in a config.pbtxt.

    Returns:
        The Triton model of each stage, by stage, none for a model that is not an in-flight model; and the other parameters.
    """
    others = dict(parameters)
    named = {stage: others.pop(_parameter(stage), None) for stage in _ALL_STAGES}
    return {stage: model for stage, model in named.items() if model is not None}, others


def check_all_named(models: Mapping[str, str], stages: Iterable[str]) -> None:
    """Raises ConfigurationError if a stage of the bundle has no Triton model."""
    for stage in stages:
        if stage not in models:
            raise ConfigurationError(
                f"config.pbtxt has no parameter {_parameter(stage)}. Assemble the repository again: diffuserve assemble BUNDLE"
            )


def _parameter(stage: str) -> str:
    return f"{stage}_model"
