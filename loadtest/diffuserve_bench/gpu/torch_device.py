"""PyTorch on the device of a run, and how long it takes there."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from diffuserve_bench.gpu.record import Skipped
from diffuserve_bench.gpu.settings import Settings

if TYPE_CHECKING:
    import torch


def torch_device(settings: Settings) -> torch.device:
    """The device.

    Raises:
        Skipped: PyTorch sees no GPU.
    """
    import torch

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise Skipped(f"PyTorch {torch.__version__} sees no NVIDIA GPU")
    return torch.device(settings.device)


def precision_on(device: torch.device) -> tuple[str, torch.dtype]:
    """What a model runs in: fp16 on a GPU, fp32 on a CPU, which has no half-precision arithmetic of its own."""
    import torch

    return ("fp16", torch.float16) if device.type == "cuda" else ("fp32", torch.float32)


def compiler_on(device: torch.device) -> str:
    """The backend of torch.compile; on a CPU, in a dry run, one that compiles nothing, so that calls are traced only."""
    return "inductor" if device.type == "cuda" else "eager"


def wait_for(device: torch.device) -> None:
    """Until it has done what it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_s(call: Callable[[], Any], device: torch.device, calls: int, *, inner: int = 1) -> float:
    """Seconds of a call: the median of `calls` measurements after one that is not counted, each of `inner` calls in a row, from
    before the first until the device has done the last."""
    times_s = []
    for _ in range(1 + calls):
        wait_for(device)
        started_s = time.perf_counter()
        for _ in range(inner):
            call()
        wait_for(device)
        times_s.append((time.perf_counter() - started_s) / inner)
    return statistics.median(times_s[1:])
