"""What this machine's processor can compute with."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from diffuserve.errors import BundleError

# Linux's names for instructions that multiply bf16 numbers. AVX-512 alone only emulates them, slower than fp32, although
# OpenVINO already reports BF16 for it.
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
_CPUINFO = Path("/proc/cpuinfo")


def processor_flags() -> frozenset[str]:
    """The instruction sets that Linux reports; empty where there is no /proc/cpuinfo."""
    return frozenset(_cpuinfo("flags").split())


def processor_name() -> str:
    """Such as "AMD EPYC 7763 64-Core Processor"."""
    return _cpuinfo("model name") or platform.machine()


def computes_bf16() -> bool:
    """Whether the processor has bf16 arithmetic of its own: AVX512_BF16 or AMX."""
    return bool(processor_flags() & _BF16_FLAGS)


def refuse_without_bf16(which: str) -> None:
    """Args:
        which: asks for it, as in "which the component asks for".

    Raises:
        BundleError: the processor has no bf16 arithmetic.
    """
    if not computes_bf16():
        raise BundleError(
            f"This processor ({processor_name()}) has no bf16 arithmetic (AVX512_BF16 or AMX), {which}. Choose another: "
            "diffuserve engines BUNDLE --select auto"
        )


def usable_cores() -> int:
    """Cores that this process may run on, which in a container may be fewer than there are."""
    return len(os.sched_getaffinity(0))


def _cpuinfo(field: str) -> str:
    """The first core's value of a line `field : value`."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return ""
    return next(
        (value.strip() for name, _, value in (line.partition(":") for line in lines) if name.strip() == field), ""
    )
