"""Copies between arrays of the host and PyTorch's tensors that nobody waits for.

The driver copies page-locked ("pinned") memory while the host goes on. PyTorch keeps such memory for the next copy, once it has
been copied.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


def to_device(array: NDArray[Any], device: torch.device, *, pinned: bool) -> torch.Tensor:
    """A copy of `array`, of its dtype, on the device's current stream."""
    import torch

    copy = torch.empty(array.shape, dtype=getattr(torch, array.dtype.name), pin_memory=pinned)
    copy.numpy()[...] = array
    return copy.to(device, non_blocking=True)


def to_host(tensors: Iterable[torch.Tensor], *, pinned: bool) -> list[torch.Tensor]:
    """Copies in the host's memory. Of pinned ones nothing is there before the stream has done what it was given."""
    import torch

    return [
        torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned).copy_(tensor, non_blocking=True)
        for tensor in tensors
    ]
