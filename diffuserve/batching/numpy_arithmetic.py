"""A step's arithmetic in the host's memory, by NumPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffuserve.batching.arithmetic import Advanced
from diffuserve.batching.jobs import Latent
from diffuserve.samplers import advance
from diffuserve.stages import Conditioning, Float32


class NumpyArithmetic:
    """Implements `diffuserve.batching.arithmetic.Arithmetic`."""

    def place(self, array: Float32) -> Float32:
        return array

    def step(self, batch: Sequence[Latent]) -> NumpyStep:
        return NumpyStep(batch)

    def latents(self, states: Sequence[Float32]) -> Float32:
        return np.stack([state[0] for state in states])


class NumpyStep:
    """Implements `diffuserve.batching.arithmetic.Step`. Rows: one for each latent, then one more for each that has guidance."""

    def __init__(self, batch: Sequence[Latent]) -> None:
        self._batch = batch
        self._guided = [row for row, latent in enumerate(batch) if latent.job.unconditional is not None]

    def unet_inputs(self) -> tuple[Float32, Float32, Conditioning]:
        batch, guided = self._batch, self._guided
        sample = np.stack([latent.state[0] * latent.job.trajectory.input_scale[latent.position] for latent in batch])
        timestep = np.array([latent.job.trajectory.timesteps[latent.position] for latent in batch], np.float32)
        rows = [latent.job.conditioning for latent in batch]
        rows += [embedding for row in guided if (embedding := batch[row].job.unconditional) is not None]
        conditioning = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return np.concatenate([sample, sample[guided]]), np.concatenate([timestep, timestep[guided]]), conditioning

    async def advance(self, output: Float32) -> list[Advanced | None]:
        with np.errstate(all="ignore"):  # values that are not finite are found below, and fail their own request only
            prediction = self._prediction(output)
            noise = np.zeros_like(prediction)
            for row, latent in enumerate(self._batch):
                if latent.job.trajectory.draws_noise[latent.position]:
                    noise[row] = latent.generator.randn(latent.job.shape)
            states = [latent.state for latent in self._batch]
            updates = [latent.job.trajectory.update[latent.position] for latent in self._batch]
            advanced = advance(states, prediction, noise, updates)
            return [
                Advanced(state, self._denoised(latent, prediction[row])) if np.isfinite(state).all() else None
                for row, (latent, state) in enumerate(zip(self._batch, advanced, strict=True))
            ]

    def _prediction(self, output: Float32) -> Float32:
        """Guidance for those that have it: (B, C, h, w) float32, a new array."""
        count, guided = len(self._batch), self._guided
        prediction = output[:count].copy()
        if guided:
            scale = np.array([self._batch[row].job.guidance_scale for row in guided], np.float32)[:, None, None, None]
            unconditional = output[count:]
            prediction[guided] = unconditional + scale * (prediction[guided] - unconditional)
        return prediction

    def _denoised(self, latent: Latent, prediction: Float32) -> Float32 | None:
        if not latent.wants_preview:
            return None
        of_latents, of_output = latent.job.trajectory.denoised[latent.position]
        denoised: Float32 = of_latents * latent.state[0] + of_output * prediction
        return denoised
