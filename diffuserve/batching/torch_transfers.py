"""Copies between the host's memory and a device's, by PyTorch, that hold up neither."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from diffuserve.stages import Float32, checked
from diffuserve.tensors import UNET
from diffuserve.torch_copies import to_device, to_host

if TYPE_CHECKING:
    import torch


class TorchTransfers:
    """On the device's current stream, behind what it has been given to do.

    Args:
        device: where tensors are.
        timeout_s: seconds after which the device counts as hung.
    """

    def __init__(self, device: torch.device, timeout_s: float) -> None:
        self.device = device
        self._timeout_s = timeout_s
        self._pinned = device.type == "cuda"

    def put(self, array: Float32) -> torch.Tensor:
        """A copy of an array on the device, that nobody waits for."""
        return to_device(array, self.device, pinned=self._pinned)

    async def fetch(self, *tensors: torch.Tensor) -> list[NDArray[Any]]:
        """Copies in the host's memory, once the device has made the tensors; one wait for all of them, in another thread.

        Raises:
            StageFailed: the device has failed, or hangs. What it has been given to do is the UNet's call.
        """
        import torch

        copies = to_host(tensors, pinned=self._pinned)
        if self._pinned:
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(torch.cuda.current_stream(self.device))
            await checked(UNET, asyncio.to_thread(done.synchronize), self._timeout_s)
        return [copy.numpy() for copy in copies]
