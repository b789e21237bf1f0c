"""What the pipeline and its loop ask of engines: a few calls, however and wherever they are carried out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from diffuserve.defaults import CALL_TIMEOUT_S
from diffuserve.errors import StageFailed
from diffuserve.tensors import (
    CLIP_INPUT,
    CONCEPT_SCORES,
    ENCODER_HIDDEN_STATES,
    FINITE,
    IMAGE,
    LATENT_SAMPLE,
    NOISE_PRED,
    SAFETY_CHECKER,
    SAMPLE,
    TEXT_ENCODER,
    TIMESTEP,
    UNET,
    VAE_DECODER,
)

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")
Float32 = NDArray[np.float32]
# What may lie on a device: a NumPy array in the host's memory, or a torch.Tensor where `Stages.unet_device` says.
Array: TypeAlias = Any
# What the UNet is conditioned on besides sample and timestep, by input name: (B, ...) float32 each.
Conditioning = Mapping[str, Array]
ArraysByName = Mapping[str, Array]


class Stages(Protocol):
    """Carries out the stages' calls. They may run concurrently."""

    @property
    def unet_device(self) -> torch.device | None:
        """Where the UNet takes tensors as they are and returns one, without waiting for it; None: in the host's memory."""
        ...

    async def run(self, stage: str, inputs: ArraysByName) -> ArraysByName:
        """One call of a stage. `stage`: a name of `diffuserve.tensors`; `inputs`: batched arrays by input name, never
        written to, in the host's memory or all on `unet_device`. Returns the outputs by name, those of the UNet where its
        inputs are, others in the host's memory; whatever it raises fails the call alone."""
        ...


class StageCalls:
    """The calls that drawing an image takes, over whatever carries them.

    Args:
        stages: what carries them.
        timeout_s: seconds after which a call counts as hung.

    All raise StageFailed where the stage raised, hung, or left an output out.
    """

    def __init__(self, stages: Stages, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._stages = stages
        self._timeout_s = timeout_s

    async def encode_text(self, input_ids: Mapping[str, NDArray[np.int32]]) -> Conditioning:
        """`input_ids`: (B, L) int32 by input name, one for each tokenizer of the bundle. Returns the UNet's
        conditioning, (B, ...) float32 by input name."""
        return await self._run(TEXT_ENCODER, input_ids, (ENCODER_HIDDEN_STATES,))

    async def denoise(self, sample: Array, timestep: Array, conditioning: Conditioning) -> Array:
        """One UNet call. `sample`: (B, C, h, w) float32, scaled for the UNet; `timestep`: (B,) float32, each row its
        own. Returns the prediction, (B, C, h, w) float32, where they are."""
        inputs = {SAMPLE: sample, TIMESTEP: timestep[:, np.newaxis], **conditioning}
        return (await self._run(UNET, inputs, (NOISE_PRED,)))[NOISE_PRED]

    async def decode(self, latent_sample: Array) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """`latent_sample`: (B, C, h, w) float32, unit variance. Returns RGB images, (B, H, W, 3) uint8, and which of them
        were finite before they were rounded to bytes, (B,) bool."""
        outputs = await self._run(VAE_DECODER, {LATENT_SAMPLE: latent_sample}, (IMAGE, FINITE))
        return outputs[IMAGE], outputs[FINITE][..., 0]

    async def score_concepts(self, clip_input: Float32) -> Float32:
        """The safety checker; called only if the bundle has one. `clip_input`: (B, 3, S, S) float32, images that its
        image processor has prepared. Returns a score for each concept, (B, N) float32; above 0 it was found."""
        scores: Float32 = (await self._run(SAFETY_CHECKER, {CLIP_INPUT: clip_input}, (CONCEPT_SCORES,)))[CONCEPT_SCORES]
        return scores

    async def _run(self, stage: str, inputs: ArraysByName, outputs: tuple[str, ...]) -> ArraysByName:
        arrays = await checked(stage, self._stages.run(stage, inputs), self._timeout_s)
        if missing := [name for name in outputs if name not in arrays]:
            raise StageFailed(f"The stage {stage} returned {', '.join(sorted(arrays))}, and no {', '.join(missing)}.")
        return arrays


class Engine(Protocol):
    """One exported component, loaded and ready to run. Safe to call from several threads.

    One that PyTorch runs has `device`, a torch.device. Given tensors there, on its current stream, it returns tensors there
    without waiting for them.
    """

    def __call__(self, inputs: ArraysByName) -> dict[str, Array]:
        """Runs the component on batched arrays by input name; returns the outputs by name."""
        ...


def device_of(engine: Engine) -> torch.device | None:
    """Where an engine takes tensors as they are; None if it takes arrays in the host's memory only."""
    return getattr(engine, "device", None)


def on_host(array: Array) -> NDArray[Any]:
    """The array, or a tensor's values once the device has made them."""
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


async def checked(stage: str, call: Awaitable[Result], timeout_s: float) -> Result:
    """Awaits a stage's call for `timeout_s` seconds at most; whatever it raises becomes `StageFailed`."""
    try:
        return await asyncio.wait_for(call, timeout_s)
    except StageFailed:
        raise
    except TimeoutError:
        raise StageFailed(f"The stage {stage} gave no answer in time; a call may take {timeout_s:g} s.") from None
    except Exception as error:
        raise StageFailed(f"The stage {stage} failed: {error or type(error).__name__}") from error


def finite_rows(outputs: ArraysByName) -> NDArray[np.bool_]:
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
