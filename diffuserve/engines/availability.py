"""Which engines this machine can run, at which precision, and what is missing for the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from diffuserve.engines.gpu import gpu_architectures
from diffuserve.engines.onnxruntime import imported_onnxruntime
from diffuserve.engines.onnxruntime_cuda import cuda_unavailable
from diffuserve.engines.processor import computes_bf16, processor_name
from diffuserve.engines.tensorrt_library import TENSORRT, TENSORRT_RTX
from diffuserve.engines.torch import INSTALL as INSTALL_TORCH
from diffuserve.engines.torch import cuda_unavailable as torch_cuda_unavailable
from diffuserve.engines.torch import imported_torch
from diffuserve.engines.unavailable import NO_GPU, Unavailable
from diffuserve.errors import BundleError

# Packages that bring the same module under another name.
_OTHER_NAMES = {
    "onnxruntime": ("onnxruntime-gpu",),
    "onnxruntime-cuda": ("onnxruntime-gpu", "onnxruntime"),
    "torch-cuda": ("torch",),
    "tensorrt": ("tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt-rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    "cuda-python": ("cuda-bindings",),
}

_BF16_ARCHITECTURE = 80


@dataclass(frozen=True)
class Availability:
    """One way of running a component; `version` is the installed package's, `missing` is empty if it can run here."""

    engine: str
    precision: str
    version: str
    missing: tuple[Unavailable, ...]

    @property
    def usable(self) -> bool:
        return not self.missing


def availability() -> tuple[Availability, ...]:
    """Every engine and precision that diffuserve knows, those for GPUs last."""
    return tuple(
        Availability(engine, precision, _version(engine), tuple(missing for check in checks if (missing := check())))
        for engine, precision, checks in _WAYS
    )


def _version(package: str) -> str:
    """Of the package as it is installed under any of its names; empty if it is not."""
    for name in (package, *_OTHER_NAMES.get(package, ())):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def _installed(package: str, install: str) -> Callable[[], Unavailable | None]:
    def check() -> Unavailable | None:
        return None if _version(package) else Unavailable(f"the package {package} is not installed", install)

    return check


def _bf16() -> Unavailable | None:
    if computes_bf16():
        return None
    return Unavailable(
        f"this processor ({processor_name()}) has no bf16 arithmetic",
        "use fp32, or a processor with AVX512_BF16 or AMX (Intel since Cooper Lake, AMD since Zen 4)",
    )


def _gpu() -> Unavailable | None:
    return None if gpu_architectures() else NO_GPU


def _rtx_gpu() -> Unavailable | None:
    first = gpu_architectures()[:1]
    ahead = (
        f"to build for another machine: diffuserve engines BUNDLE --select {TENSORRT_RTX.engine} --architectures sm89"
    )
    if not first:
        return Unavailable(NO_GPU.reason, f"{NO_GPU.fix}; {ahead}")
    if first[0] in TENSORRT_RTX.architectures:
        return None
    return Unavailable(
        f"{TENSORRT_RTX.title} does not run on this GPU ({first[0]})",
        f"use one of {', '.join(TENSORRT_RTX.architectures)}, or the engine tensorrt; {ahead}",
    )


def _reaches_cuda(
    imported: Callable[[], Any], unavailable: Callable[[Any, Sequence[str]], Unavailable | None]
) -> Callable[[], Unavailable | None]:
    """What keeps a library, once `imported`, from a GPU."""

    def check() -> Unavailable | None:
        try:
            library = imported()
        except BundleError:
            return None  # which is said elsewhere
        missing = unavailable(library, gpu_architectures())
        return None if missing is NO_GPU else missing  # as is this

    return check


def _gpu_bf16() -> Unavailable | None:
    first = gpu_architectures()[:1]
    if not first or int(first[0].removeprefix("sm")) >= _BF16_ARCHITECTURE:
        return None  # that there is no GPU is said elsewhere
    return Unavailable(
        f"this GPU ({first[0]}) has no bf16 arithmetic", "use fp16 or fp32, or a GPU from Ampere (sm80) on"
    )


_SERVE, _OPENVINO = (f"pip install 'diffuserve[{extra}]'" for extra in ("serve", "openvino"))
_CUDA_LACKS = (_installed("onnxruntime", _SERVE), _gpu, _reaches_cuda(imported_onnxruntime, cuda_unavailable))
_TORCH_CUDA_LACKS = (_installed("torch", INSTALL_TORCH), _gpu, _reaches_cuda(imported_torch, torch_cuda_unavailable))
_TENSORRT_LACKS = (_installed("tensorrt", TENSORRT.install), _installed("cuda-python", TENSORRT.install), _gpu)
_RTX_LACKS = (
    _installed("tensorrt-rtx", TENSORRT_RTX.install),
    _installed("cuda-python", TENSORRT_RTX.install),
    _rtx_gpu,
)
# Engine, precision, and what must be there. An engine's precisions are in the order of preference.
_WAYS: tuple[tuple[str, str, tuple[Callable[[], Unavailable | None], ...]], ...] = (
    ("onnxruntime", "fp32", (_installed("onnxruntime", _SERVE),)),
    ("openvino", "fp32", (_installed("openvino", _OPENVINO),)),
    ("openvino", "bf16", (_installed("openvino", _OPENVINO), _bf16)),
    ("torch", "fp32", (_installed("torch", INSTALL_TORCH),)),
    ("torch", "bf16", (_installed("torch", INSTALL_TORCH), _bf16)),
    ("torch-cuda", "fp16", _TORCH_CUDA_LACKS),
    ("torch-cuda", "bf16", (*_TORCH_CUDA_LACKS, _gpu_bf16)),
    ("torch-cuda", "fp32", _TORCH_CUDA_LACKS),
    ("onnxruntime-cuda", "fp16", _CUDA_LACKS),
    ("onnxruntime-cuda", "fp32", _CUDA_LACKS),
    ("tensorrt", "fp16", _TENSORRT_LACKS),
    ("tensorrt", "bf16", (*_TENSORRT_LACKS, _gpu_bf16)),
    ("tensorrt", "fp32", _TENSORRT_LACKS),
    ("tensorrt-rtx", "fp16", _RTX_LACKS),
    ("tensorrt-rtx", "bf16", (*_RTX_LACKS, _gpu_bf16)),
    ("tensorrt-rtx", "fp32", _RTX_LACKS),
)
