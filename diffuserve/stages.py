"""What the pipeline and its loop ask of engines: a few calls, however and wherever they are carried out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from diffuserve.errors import StageFailed
from diffuserve.tensors import FINITE

Result = TypeVar("Result")
Float32 = NDArray[np.float32]
# What the UNet is conditioned on besides sample and timestep, by input name: (B, ...) float32 each.
Conditioning = Mapping[str, Float32]


class Stages(Protocol):
    """Text encoder, UNet, VAE decoder and safety checker. The calls may run concurrently; arguments are never written to."""

    async def encode_text(self, input_ids: Mapping[str, NDArray[np.int32]]) -> Conditioning:
        """`input_ids`: (B, L) int32 by input name, one for each tokenizer of the bundle. Returns the UNet's
        conditioning, (B, ...) float32 by input name."""
        ...

    async def denoise(self, sample: Float32, timestep: Float32, conditioning: Conditioning) -> Float32:
        """One UNet call. `sample`: (B, C, h, w) float32, scaled for the UNet; `timestep`: (B,) float32, each row its
        own. Returns the prediction, (B, C, h, w) float32."""
        ...

    async def decode(self, latent_sample: Float32) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """`latent_sample`: (B, C, h, w) float32, unit variance. Returns RGB images, (B, H, W, 3) uint8, and which of them
        were finite before they were rounded to bytes, (B,) bool."""
        ...

    async def score_concepts(self, clip_input: Float32) -> Float32:
        """The safety checker; called only if the bundle has one. `clip_input`: (B, 3, S, S) float32, images that its
        image processor has prepared. Returns a score for each concept, (B, N) float32; above 0 it was found."""
        ...


class Engine(Protocol):
    """One exported component, loaded and ready to run. Safe to call from several threads."""

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs the component on batched arrays by input name; returns the outputs by name."""
        ...


async def checked(stage: str, call: Awaitable[Result], timeout_s: float) -> Result:
    """Awaits a stage's call for `timeout_s` seconds at most; whatever it raises becomes `StageFailed`."""
    try:
        return await asyncio.wait_for(call, timeout_s)
    except StageFailed:
        raise
    except asyncio.TimeoutError:
        raise StageFailed(f"The stage {stage} gave no answer in time; a call may take {timeout_s:g} s.") from None
    except Exception as error:
        raise StageFailed(f"The stage {stage} failed: {error or type(error).__name__}") from error


def finite_rows(outputs: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """Args:
        outputs: a stage's, (B, ...) by name of `diffuserve.tensors`. Every number of a row counts; of an image, which is
            bytes, what the VAE decoder says of it in `FINITE`.

    Returns:
        (B,) bool: the rows that hold nothing else.
    """
    finite = [
        (array if name == FINITE else np.isfinite(array)).reshape(len(array), -1).all(axis=1)
        for name, array in outputs.items()
    ]
    rows: NDArray[np.bool_] = np.logical_and.reduce(finite)
    return rows
