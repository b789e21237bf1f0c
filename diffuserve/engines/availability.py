"""Which engines this machine can run, at which precision, and what the others lack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from diffuserve.engines.gpu import gpu_architectures
from diffuserve.engines.onnxruntime import CUDA
from diffuserve.engines.processor import computes_bf16, processor_name

# Packages that bring the same module under another name.
_OTHER_NAMES = {"onnxruntime": ("onnxruntime-gpu",), "onnxruntime-cuda": ("onnxruntime-gpu", "onnxruntime")}

_BF16_ARCHITECTURE = 80


@dataclass(frozen=True)
class Lack:
    """Why an engine cannot run here, and the command or step that mends it."""

    reason: str
    mend: str


@dataclass(frozen=True)
class Availability:
    """One way of running a component; `version` is the installed package's, `lacks` is empty if it can run here."""

    engine: str
    precision: str
    version: str
    lacks: tuple[Lack, ...]

    @property
    def usable(self) -> bool:
        return not self.lacks


def availability() -> tuple[Availability, ...]:
    """Every engine and precision that diffuserve knows, those for GPUs last."""
    return tuple(
        Availability(engine, precision, _version(engine), tuple(lack for check in checks if (lack := check())))
        for engine, precision, checks in _WAYS
    )


def _version(engine: str) -> str:
    """Of the installed package; empty if there is none."""
    for package in (engine, *_OTHER_NAMES.get(engine, ())):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return ""


def _installed(package: str, extra: str) -> Callable[[], Lack | None]:
    def check() -> Lack | None:
        if _version(package):
            return None
        return Lack(f"the package {package} is not installed", f"pip install 'diffuserve[{extra}]'")

    return check


def _bf16() -> Lack | None:
    if computes_bf16():
        return None
    return Lack(
        f"this processor ({processor_name()}) has no bf16 arithmetic",
        "use fp32, or a processor with AVX512_BF16 or AMX (Intel since Cooper Lake, AMD since Zen 4)",
    )


def _gpu() -> Lack | None:
    if gpu_architectures():
        return None
    return Lack(
        "no NVIDIA GPU can be seen",
        "use a machine with one and its driver; in a container: docker run --gpus all",
    )


def _cuda_provider() -> Lack | None:
    try:
        import onnxruntime
    except ImportError:
        return None  # which is a lack of its own
    if CUDA in onnxruntime.get_available_providers():
        return None
    return Lack(
        f"onnxruntime {onnxruntime.__version__} was built without CUDA",
        "pip uninstall onnxruntime && pip install onnxruntime-gpu",
    )


def _gpu_bf16() -> Lack | None:
    first = gpu_architectures()[:1]
    if not first or int(first[0].removeprefix("sm")) >= _BF16_ARCHITECTURE:
        return None  # that there is no GPU is a lack of its own
    return Lack(f"this GPU ({first[0]}) has no bf16 arithmetic", "use fp16 or fp32, or a GPU from Ampere (sm80) on")


_CUDA_LACKS = (_installed("onnxruntime", "serve"), _gpu, _cuda_provider)
_TENSORRT_LACKS = (_installed("tensorrt", "tensorrt"), _gpu)
# Engine, precision, and what must be there. An engine's precisions are in the order of preference.
_WAYS: tuple[tuple[str, str, tuple[Callable[[], Lack | None], ...]], ...] = (
    ("onnxruntime", "fp32", (_installed("onnxruntime", "serve"),)),
    ("openvino", "fp32", (_installed("openvino", "openvino"),)),
    ("openvino", "bf16", (_installed("openvino", "openvino"), _bf16)),
    ("onnxruntime-cuda", "fp16", _CUDA_LACKS),
    ("onnxruntime-cuda", "fp32", _CUDA_LACKS),
    ("tensorrt", "fp16", _TENSORRT_LACKS),
    ("tensorrt", "bf16", (*_TENSORRT_LACKS, _gpu_bf16)),
    ("tensorrt", "fp32", _TENSORRT_LACKS),
)
