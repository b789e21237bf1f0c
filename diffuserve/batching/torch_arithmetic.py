"""A step's arithmetic on the device that the UNet runs on, by PyTorch.

Latents, embeddings and predictions stay there. A step sends a few numbers for each row, and noise where a sampler draws it;
what comes back is one number for each row, whether it is finite. That is the one time that a step waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from diffuserve.batching.arithmetic import Advanced
from diffuserve.batching.jobs import Latent
from diffuserve.batching.torch_transfers import TorchTransfers
from diffuserve.stages import Conditioning, Float32

if TYPE_CHECKING:
    import torch


class TorchArithmetic:
    """Implements `diffuserve.batching.arithmetic.Arithmetic`.

    Args:
        transfers: from and to the device.
    """

    def __init__(self, transfers: TorchTransfers) -> None:
        self._transfers = transfers

    def place(self, array: Float32) -> torch.Tensor:
        return self._transfers.put(array)

    def step(self, batch: Sequence[Latent]) -> TorchStep:
        return TorchStep(batch, self._transfers)

    def latents(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        return torch.stack([state[0] for state in states])


class TorchStep:
    """Implements `diffuserve.batching.arithmetic.Step`.

    Rows: the B latents, those with guidance first, so that they are a slice; then one more for each of the latter. All have
    as many slots, K, as the one that needs most; what a state lacks is zero, in it and in its matrix.
    """

    def __init__(self, batch: Sequence[Latent], transfers: TorchTransfers) -> None:
        self._transfers = transfers
        self._order = sorted(range(len(batch)), key=lambda row: batch[row].job.unconditional is None)
        self._latents = [batch[row] for row in self._order]
        self._guided = sum(latent.job.unconditional is not None for latent in batch)
        self._slots = max(latent.job.trajectory.slots for latent in batch)
        self._timesteps, self._scales, self._guidance, self._updates = self._put_numbers()
        self._states = self._stacked_states()

    def unet_inputs(self) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
        import torch

        latents = self._states[:, 0]
        count, guided = len(latents), self._guided
        sample = latents.new_empty((count + guided, *latents.shape[1:]))
        torch.mul(latents, self._scales[:count], out=sample[:count])
        torch.mul(latents[:guided], self._scales[count:], out=sample[count:])
        rows = [latent.job.conditioning for latent in self._latents]
        rows += [each for latent in self._latents if (each := latent.job.unconditional) is not None]
        return sample, self._timesteps, {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    async def advance(self, output: torch.Tensor) -> list[Advanced | None]:
        import torch

        with torch.no_grad():
            prediction = self._prediction(output)
            advanced = self._advanced(prediction)
            # The largest value is not finite if one is not.
            largest = torch.linalg.vector_norm(advanced.flatten(1), math.inf, dim=1)
            denoised = self._denoised(prediction)
            states = [torch.empty_like(latent.state) for latent in self._latents]
            torch._foreach_copy_(states, [row[: len(state)] for row, state in zip(advanced, states, strict=True)])
        largest_of, *estimates = await self._transfers.fetch(largest, *denoised.values())
        estimate_of = dict(zip(denoised, estimates, strict=True))
        result: list[Advanced | None] = [None] * len(states)
        for row, place in enumerate(self._order):
            if math.isfinite(largest_of[row]):
                result[place] = Advanced(states[row], estimate_of.get(row))
        return result

    def _put_numbers(self) -> list[torch.Tensor]:
        """What a step needs of the trajectories, in one copy.

        Returns:
            Timesteps, (R,); input scales, (R, 1, 1, 1); guidance scales of those that have them, (G, 1, 1, 1); the weight of
            each input in each new slot, (K + 2, B, K, 1, 1, 1). All float32.
        """
        count, guided, slots = len(self._latents), self._guided, self._slots
        at = [(latent.job.trajectory, latent.position) for latent in self._latents]
        timesteps = [float(trajectory.timesteps[position]) for trajectory, position in at]
        scales = [float(trajectory.input_scale[position]) for trajectory, position in at]
        guidance = [latent.job.guidance_scale for latent in self._latents[:guided]]
        updates = np.zeros((slots + 2, count, slots), np.float32)
        for row, (trajectory, position) in enumerate(at):
            own, update = trajectory.slots, trajectory.update[position].T
            updates[:own, row, :own] = update[:own]
            updates[slots:, row, :own] = update[own:]
        rows = [*timesteps, *timesteps[:guided], *scales, *scales[:guided], *guidance]
        numbers = self._transfers.put(np.concatenate([np.array(rows, np.float32), updates.ravel()]))
        sizes = (count + guided, count + guided, guided, updates.size)
        shapes = ((-1,), (-1, 1, 1, 1), (-1, 1, 1, 1), (*updates.shape, 1, 1, 1))
        return [part.view(shape) for part, shape in zip(numbers.split_with_sizes(sizes), shapes, strict=True)]

    def _stacked_states(self) -> torch.Tensor:
        """(B, K, C, h, w) float32."""
        import torch

        states = [latent.state for latent in self._latents]
        shape = states[0].shape[1:]
        fewest = min(map(len, states))
        if fewest < self._slots:
            padding = states[0].new_zeros((self._slots - fewest, *shape))
            states = [part for state in states for part in (state, padding[: self._slots - len(state)])]
        return torch.cat(states).view(-1, self._slots, *shape)

    def _prediction(self, output: torch.Tensor) -> torch.Tensor:
        """With guidance where there is any: (B, C, h, w) float32."""
        import torch

        count, guided = len(self._latents), self._guided
        if not guided:
            return output
        unconditional = output[count:]
        prediction = torch.addcmul(unconditional, self._guidance, output[:guided] - unconditional)
        return prediction if guided == count else torch.cat([prediction, output[guided:count]])

    def _advanced(self, prediction: torch.Tensor) -> torch.Tensor:
        """The new states, (B, K, C, h, w) float32.

        A matrix product would sum in another order for another number of rows. Here each input is added in its turn. To zero,
        so that nothing becomes -0, and a padded slot adds nothing.
        """
        inputs = [*self._states.unbind(1), prediction]
        if (noise := self._noise()) is not None:
            inputs.append(noise)
        advanced = self._states.new_zeros(self._states.shape)
        for weights, values in zip(self._updates, inputs, strict=False):
            advanced.addcmul_(weights, values[:, None])
        return advanced

    def _noise(self) -> torch.Tensor | None:
        """Drawn on the host, where every seed gives its own: (B, C, h, w) float32, zeros where none is drawn; None if it is
        drawn nowhere."""
        import torch

        drawn = [
            latent.generator.randn(latent.job.shape) if latent.job.trajectory.draws_noise[latent.position] else None
            for latent in self._latents
        ]
        draws = [each for each in drawn if each is not None]
        if not draws:
            return None
        noise = self._transfers.put(np.stack(draws))
        if len(draws) == len(drawn):
            return noise
        rows, zero = iter(noise.unbind()), noise.new_zeros(noise.shape[1:])
        return torch.stack([zero if each is None else next(rows) for each in drawn])

    def _denoised(self, prediction: torch.Tensor) -> dict[int, torch.Tensor]:
        """By row, where a preview is wanted."""
        denoised = {}
        for row, latent in enumerate(self._latents):
            if latent.wants_preview:
                of_latents, of_output = latent.job.trajectory.denoised[latent.position].tolist()
                denoised[row] = of_latents * latent.state[0] + of_output * prediction[row]
        return denoised
