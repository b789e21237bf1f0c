"""Arrays of the host and PyTorch's tensors on a GPU as Triton's tensors, and back.

Triton hands memory of a GPU from process to process without a copy through the host, by DLPack in each of them. Where it is
used nothing has run on a GPU yet.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import triton_python_backend_utils as pb_utils

from diffuserve.bundle.manifest import Component
from diffuserve.engines import ON_FIRST_GPU
from diffuserve.stages import Array, on_host

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


def device_for(component: Component) -> torch.device | None:
    """The GPU on which a component's engine, in another process, takes tensors; None if it takes arrays only, or if this
    process cannot use the GPU."""
    if component.engine not in ON_FIRST_GPU:
        return None
    try:
        import torch

        # The driver's first call takes seconds, which no request is to wait for.
        return torch.zeros(1, device=torch.device("cuda", 0)).device
    except Exception as error:  # not installed, or whatever CUDA lacks
        log.warning("latents stay in the host's memory, since PyTorch cannot use the GPU in this process: %s", error)
        return None


def to_triton(name: str, array: Array) -> Any:
    """The `pb_utils.Tensor`. It waits for what makes the array, which it may share memory with."""
    if isinstance(array, np.ndarray):
        return pb_utils.Tensor(name, np.ascontiguousarray(array))
    return pb_utils.Tensor.from_dlpack(name, array.contiguous())


def from_triton(tensor: Any) -> Array:
    """An array, or a tensor where the memory is a GPU's; of memory that Triton uses again once the message is gone."""
    if tensor.is_cpu():
        return tensor.as_numpy()
    from torch.utils.dlpack import from_dlpack

    return from_dlpack(tensor.to_dlpack())


def owned(array: Array) -> Array:
    """A copy of what `from_triton` gave, once it is made."""
    if isinstance(array, np.ndarray):
        return array.copy()
    import torch

    copy = array.clone()
    if copy.is_cuda:
        torch.cuda.current_stream(copy.device).synchronize()
    return copy


def joined(arrays: Sequence[Array]) -> Array:
    """Rows of several requests one after another, where the first one's are."""
    first, *rest = arrays
    if not rest:
        return first
    if isinstance(first, np.ndarray):
        return np.concatenate([first, *map(on_host, rest)])
    import torch

    return torch.cat([first, *(torch.as_tensor(each, device=first.device) for each in rest)])
