"""What a step computes with, besides the UNet: its inputs, guidance, the samplers' updates.

It goes where the UNet takes its inputs, since a copy there and back would delay every step:

    numpy_arithmetic.py     in the host's memory
    torch_arithmetic.py     in that of the device that the UNet runs on

The loop knows neither. It passes on what they make, `diffuserve.stages.Array`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from diffuserve.batching.jobs import Latent
from diffuserve.stages import Array, Conditioning, Float32


class Advanced(NamedTuple):
    """A latent after a step.

    `state`: (K, C, h, w) float32, its own memory, so that a paused latent keeps no other's; `denoised`: (C, h, w) float32 in
    the host's memory, the estimate of the finished latents, where the job wants a preview of this step.
    """

    state: Array
    denoised: Float32 | None


class Step(Protocol):
    """One UNet call of a batch, and what the samplers make of its output."""

    def unet_inputs(self) -> tuple[Array, Array, Conditioning]:
        """Sample, timesteps and conditioning as `StageCalls.denoise` takes them: R rows, of each latent one, and one more if
        it has guidance."""
        ...

    async def advance(self, output: Array) -> list[Advanced | None]:
        """Applies classifier-free guidance (Ho and Salimans, arXiv:2207.12598), and takes each latent one UNet evaluation
        further in its own trajectory.

        Args:
            output: (R, C, h, w) float32, the UNet's, of the rows of `unet_inputs`. It is not written to, and not used any more
                once this has returned.

        Returns:
            For each latent, in the batch's order, what has become of it; None where values are not finite. A latent does not
            depend on the others, to the last bit.
        """
        ...


class Arithmetic(Protocol):
    """What the loop needs of arrays."""

    def place(self, array: Float32) -> Array:
        """An array of the host where steps compute; that array itself if it is there."""
        ...

    def step(self, batch: Sequence[Latent]) -> Step:
        """The next step of latents that have the same `Job.batch_key` and are not finished."""
        ...

    def latents(self, states: Sequence[Array]) -> Array:
        """(n, C, h, w) float32: slot 0 of n states."""
        ...
