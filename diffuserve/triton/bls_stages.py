"""The stages as calls to the other models of the same Triton server (business logic scripting)."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from diffuserve.errors import StageFailed
from diffuserve.stages import Conditioning, Float32
from diffuserve.tensors import TEXT_ENCODER, UNET, VAE_DECODER


class BlsStages:
    """Implements `diffuserve.stages.Stages`.

    Args:
        outputs: the names of each stage's outputs.
    """

    def __init__(self, outputs: dict[str, list[str]]) -> None:
        self._outputs = outputs
        # The loop works on numpy arrays, so outputs of engines on a GPU are asked for in the host's memory.
        self._memory = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0)
        self._calls: set[asyncio.Task[dict[str, NDArray[Any]]]] = set()

    @property
    def calls(self) -> int:
        """Calls that have not returned, those of cancelled requests included."""
        return len(self._calls)

    async def encode_text(self, input_ids: NDArray[np.int32]) -> Conditioning:
        return await self._call(TEXT_ENCODER, {"input_ids": input_ids})

    async def denoise(self, sample: Float32, timestep: Float32, conditioning: Conditioning) -> Float32:
        outputs = await self._call(UNET, {"sample": sample, "timestep": timestep[:, np.newaxis], **conditioning})
        return outputs["noise_pred"]

    async def decode(self, latent_sample: Float32) -> NDArray[np.uint8]:
        return (await self._call(VAE_DECODER, {"latent_sample": latent_sample}))["image"]

    async def _call(self, stage: str, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        # A call cannot be taken back. When the request that made it is cancelled it runs on, and Triton must not be
        # stopped before it returns.
        call = asyncio.create_task(self._execute(stage, inputs))
        self._calls.add(call)
        call.add_done_callback(self._forget)
        return await asyncio.shield(call)

    def _forget(self, call: asyncio.Task[dict[str, NDArray[Any]]]) -> None:
        self._calls.discard(call)
        if not call.cancelled():
            call.exception()  # read, so that asyncio does not report it where nobody waits for the call any more

    async def _execute(self, stage: str, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        request = pb_utils.InferenceRequest(
            model_name=stage,
            requested_output_names=self._outputs[stage],
            inputs=[pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in inputs.items()],
            preferred_memory=self._memory,
        )
        response = await request.async_exec()
        if response.has_error():
            raise StageFailed(f"The stage {stage} failed: {response.error().message()}")
        # Copied, since the arrays lie in shared memory that Triton reuses once the response is gone.
        return {tensor.name(): tensor.as_numpy().copy() for tensor in response.output_tensors()}
