"""A batch of latents as the rows of one UNet call, and its output as a prediction for each latent."""

from __future__ import annotations

import numpy as np

from diffuserve.batching.jobs import Latent
from diffuserve.stages import Conditioning, Float32


def unet_inputs(batch: list[Latent]) -> tuple[Float32, Float32, Conditioning]:
    """Stacks a batch for the UNet: a row for each latent, then one more for each that has guidance."""
    guided = [row for row, latent in enumerate(batch) if latent.job.unconditional is not None]
    sample = np.stack([latent.state[0] * latent.job.trajectory.input_scale[latent.position] for latent in batch])
    timestep = np.array([latent.job.trajectory.timesteps[latent.position] for latent in batch], np.float32)
    rows = [latent.job.conditioning for latent in batch]
    rows += [embedding for row in guided if (embedding := batch[row].job.unconditional) is not None]
    conditioning = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return np.concatenate([sample, sample[guided]]), np.concatenate([timestep, timestep[guided]]), conditioning


def guided_prediction(batch: list[Latent], output: Float32) -> Float32:
    """Classifier-free guidance (Ho and Salimans, arXiv:2207.12598) for the rows that have it.

    Args:
        output: (rows, C, h, w) float32 in the order of `unet_inputs`.

    Returns:
        (len(batch), C, h, w) float32, a new array.
    """
    prediction = output[: len(batch)].copy()
    guided = [row for row, latent in enumerate(batch) if latent.job.unconditional is not None]
    if guided:
        scale = np.array([batch[row].job.guidance_scale for row in guided], np.float32)[:, None, None, None]
        unconditional = output[len(batch) :]
        prediction[guided] = unconditional + scale * (prediction[guided] - unconditional)
    return prediction
