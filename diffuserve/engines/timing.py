"""How long one UNet call takes, by its number of rows: what the in-flight loop shapes its batches by."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffuserve.bundle import ModelSpec
from diffuserve.stages import Engine
from diffuserve.tensors import ENCODER_HIDDEN_STATES

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def unet_seconds(engine: Engine, model: ModelSpec, *, repeats: int = 3) -> dict[int, float]:
    """Seconds of a call at the model's native size, by rows: the fastest of `repeats`, after one that is not counted."""
    return {rows: min(_times(engine, model, rows, repeats)) for rows in ROWS}


def _times(engine: Engine, model: ModelSpec, rows: int, repeats: int) -> list[float]:
    inputs = unet_inputs(model, rows)
    engine(inputs)
    times_s = []
    for _ in range(repeats):
        started_s = time.perf_counter()
        engine(inputs)
        times_s.append(time.perf_counter() - started_s)
    return times_s


def unet_inputs(model: ModelSpec, rows: int) -> dict[str, NDArray[Any]]:
    """Unit noise at the native size: (rows, C, h, w), timesteps (rows, 1) and text (rows, L, D), all float32."""
    rng = np.random.default_rng(0)
    scale = model.vae_scale_factor
    shape = (rows, model.latent_channels, model.height // scale, model.width // scale)
    return {
        "sample": rng.standard_normal(shape, np.float32),
        "timestep": np.full((rows, 1), 500, np.float32),
        ENCODER_HIDDEN_STATES: rng.standard_normal((rows, model.max_tokens, model.hidden_size), np.float32),
    }
