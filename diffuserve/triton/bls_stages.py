"""The stages as calls to the other models of the same Triton server (business logic scripting).

When a model's process dies, Triton goes on calling the model ready, answers each of its requests with an error within
about a second, and never starts the process again. So the first call that meets this error has Triton load the model
once more, and is then tried a second time; calls that come meanwhile wait. A request loses a few seconds, not its
image. That needs a Triton started by the launcher; under another such calls fail until it is started again.

Where the UNet's engine takes tensors on a GPU it gets them from the loop's arithmetic and returns them to it without a
copy through the host. Some systems do not let processes share a GPU's memory; there the copies are made.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import triton_python_backend_utils as pb_utils

from diffuserve.engines.row_pieces import join_rows, split_rows
from diffuserve.engines.tensorrt_profiles import Profile, most_rows
from diffuserve.errors import StageFailed, from_wire
from diffuserve.stages import ArraysByName, on_host
from diffuserve.tensors import UNET
from diffuserve.triton.device_tensors import from_triton, owned, to_triton
from diffuserve.triton.model_control import ModelControl

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# Triton's words for a model whose process has died.
_DEAD = "is not healthy"
# How long a call waits for a model to be loaded again; the largest take about a minute.
_LOAD_TIMEOUT_S = 120.0


class BlsStages:
    """Implements `diffuserve.stages.Stages`.

    Args:
        models: the Triton model that runs each stage.
        outputs: the names of each stage's outputs.
        ranges: the profiles of each stage that runs a TensorRT plan; its calls are made in pieces that a profile allows.
        unet_device: see `diffuserve.stages.Stages`.
    """

    def __init__(
        self,
        models: Mapping[str, str],
        outputs: Mapping[str, list[str]],
        ranges: Mapping[str, Sequence[Profile]],
        unet_device: torch.device | None = None,
    ) -> None:
        self._models = models
        self._outputs = outputs
        self._ranges = ranges
        self._unet_device = unet_device
        # Whether Triton hands a GPU's memory on, as far as is known.
        self._hands_over = True
        self._calls: set[asyncio.Task[ArraysByName]] = set()
        self._model_control = ModelControl.from_environment()
        # The latest load of each stage that has died, running or done. Its result is why it failed, or None: an exception
        # would be raised in every call that waits, and its traceback keep their requests.
        self._loads: dict[str, asyncio.Task[str | None]] = {}
        # A pool of its own, since hung calls may fill the event loop's.
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="stage loader")

    @property
    def calls(self) -> int:
        """Calls that have not returned, those of cancelled requests included."""
        return len(self._calls)

    @property
    def unet_device(self) -> torch.device | None:
        return self._unet_device

    async def run(self, stage: str, inputs: ArraysByName) -> ArraysByName:
        # A call cannot be taken back. When the request that made it is cancelled it runs on, and Triton must not be
        # stopped before it returns.
        are_arrays = all(isinstance(array, np.ndarray) for array in inputs.values())
        call = asyncio.create_task(
            self._execute_in_pieces(stage, inputs) if are_arrays else self._execute_on_tensors(stage, inputs)
        )
        self._calls.add(call)
        call.add_done_callback(self._forget)
        return await asyncio.shield(call)

    async def _execute_on_tensors(self, stage: str, inputs: ArraysByName) -> ArraysByName:
        """Hands them to the UNet as they are. Other stages take, and return, arrays."""
        failure = None
        if stage == UNET and self._hands_over:
            try:
                return await self._execute(stage, inputs)
            except Exception as error:  # tried once more by way of the host, which tells whose fault it is
                failure = error
        arrays = await asyncio.to_thread(lambda: {name: on_host(array) for name, array in inputs.items()})
        outputs = await self._execute_in_pieces(stage, arrays)
        if failure is not None:
            log.warning("tensors go through the host's memory from now on, which is slower: %s", failure)
            self._hands_over = False
        if stage != UNET:
            return outputs
        import torch

        return {name: torch.from_numpy(array).to(self._unet_device) for name, array in outputs.items()}

    def _forget(self, call: asyncio.Task[ArraysByName]) -> None:
        self._calls.discard(call)
        if not call.cancelled():
            call.exception()  # read, so that asyncio does not report it where nobody waits for the call any more

    async def _execute_in_pieces(self, stage: str, inputs: ArraysByName) -> ArraysByName:
        if stage not in self._ranges:
            return await self._execute(stage, inputs)
        most = most_rows(self._ranges[stage], {name: array.shape for name, array in inputs.items()})
        return join_rows([await self._execute(stage, piece) for piece in split_rows(inputs, most)])

    async def _execute(self, stage: str, inputs: ArraysByName) -> ArraysByName:
        load = self._loads.get(stage)
        if load is not None:
            load = self._load_after(load, stage) if load.done() and load.result() else load
            await self._wait_for(load, stage)
        response = await self._infer(stage, inputs)
        # A load that began during the call takes the model away for a moment, which other errors than _DEAD tell.
        if response.has_error() and (_DEAD in response.error().message() or self._loads.get(stage) is not load):
            await self._wait_for(self._load_after(load, stage), stage)
            response = await self._infer(stage, inputs)
        if response.has_error():
            message = response.error().message()
            raise from_wire(message) or StageFailed(f"The stage {self._models[stage]} failed: {message}")
        # Triton reuses the memory once the response is gone.
        return {tensor.name(): owned(from_triton(tensor)) for tensor in response.output_tensors()}

    async def _infer(self, stage: str, inputs: ArraysByName) -> Any:
        """Outputs come where the inputs are."""
        tensors = [to_triton(name, array) for name, array in inputs.items()]
        on_host = all(tensor.is_cpu() for tensor in tensors)
        memory = pb_utils.TRITONSERVER_MEMORY_CPU if on_host else pb_utils.TRITONSERVER_MEMORY_GPU
        request = pb_utils.InferenceRequest(
            model_name=self._models[stage],
            requested_output_names=self._outputs[stage],
            inputs=tensors,
            preferred_memory=pb_utils.PreferredMemory(memory, 0),
        )
        return await request.async_exec()

    def _load_after(self, load: asyncio.Task[str | None] | None, stage: str) -> asyncio.Task[str | None]:
        """The load that follows `load`: started now, unless another call has done so."""
        if self._loads.get(stage) is load:
            self._loads[stage] = asyncio.create_task(self._load(stage))
        return self._loads[stage]

    async def _load(self, stage: str) -> str | None:
        model = self._models[stage]
        if self._model_control is None:
            return f"The process of {model} has died. Start Triton again, best by `diffuserve serve`."
        log.warning("the process of %s has died; loading the model again", model)
        started_s = time.monotonic()
        try:
            await asyncio.get_running_loop().run_in_executor(self._loader, self._model_control.reload, model)
        except Exception as error:
            log.error("%s could not be loaded again: %s", model, error)
            return f"The process of {model} has died, and it could not be loaded again. {error}"
        log.warning("%s is loaded again, %.1f s", model, time.monotonic() - started_s)
        return None

    async def _wait_for(self, load: asyncio.Task[str | None], stage: str) -> None:
        try:
            failure = await asyncio.wait_for(asyncio.shield(load), _LOAD_TIMEOUT_S)
        except TimeoutError:
            failure = f"The process of {self._models[stage]} has died, and loading it again takes longer than {_LOAD_TIMEOUT_S:g} s."
        if failure:
            raise StageFailed(failure)
