"""Inputs to run a component on when nothing but its tensors are known: to warm it, to time it, to compare engines."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffuserve.bundle.manifest import ModelSpec
from diffuserve.tensors import (
    HEIGHT,
    LATENT_HEIGHT,
    LATENT_WIDTH,
    NUMPY_DTYPE,
    TIMESTEP,
    TOKENS,
    WIDTH,
    StageSpec,
    TensorSpec,
)

Arrays = dict[str, NDArray[Any]]

# Rows of one request and of one guided request: what a server sees first.
WARM_BATCHES = (1, 2)
# The first entries of a byte-level vocabulary are the bytes: every tokenizer has them.
_TOKENS = 256


def native_sizes(model: ModelSpec) -> dict[str, int]:
    """The length of each named dimension for an image of the model's width and height and a prompt of one chunk."""
    return {
        TOKENS: model.max_tokens,
        LATENT_HEIGHT: model.height // model.vae_scale_factor,
        LATENT_WIDTH: model.width // model.vae_scale_factor,
        HEIGHT: model.height,
        WIDTH: model.width,
    }


def example_inputs(
    tensors: StageSpec, model: ModelSpec, batch: int, known: Mapping[str, NDArray[Any]] = MappingProxyType({})
) -> Arrays:
    """The same numbers at every call.

    Args:
        tensors: the component's.
        model: its width and height, in pixels, are the size.
        batch: rows.
        known: arrays to take rows from instead, by input name, such as a text encoder's output for the UNet.
    """
    rng, sizes = np.random.default_rng(0), native_sizes(model)

    def example(spec: TensorSpec) -> NDArray[Any]:
        shape = spec.shape(batch, sizes)
        array = known.get(spec.name)
        if array is not None and array.shape[1:] == shape[1:]:
            return np.take(array, np.arange(batch) % len(array), axis=0)
        if spec.name == TIMESTEP:
            return np.linspace(981, 1, batch, dtype=np.float32)[:, np.newaxis]
        if spec.dtype == "FP32":
            return rng.standard_normal(shape, dtype=np.float32)
        return rng.integers(0, _TOKENS, shape).astype(NUMPY_DTYPE[spec.dtype])

    return {spec.name: example(spec) for spec in tensors.inputs}
