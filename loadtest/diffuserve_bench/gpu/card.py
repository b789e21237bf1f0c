"""The GPU as its driver's tool sees it: what a run was measured on, and how much of its memory is taken."""

from __future__ import annotations

import subprocess
from importlib import metadata
from typing import Any

from diffuserve_loadtest.report.machine import describe_machine

# As nvidia-smi calls them; "N/A" where a card or a driver does not tell.
_FIELDS = {
    "card": "name",
    "driver": "driver_version",
    "compute_capability": "compute_cap",
    "memory": "memory.total",
    "sm_clock": "clocks.sm",
    "sm_clock_max": "clocks.max.sm",
    "memory_clock": "clocks.mem",
    "power_limit": "power.limit",
    "temperature_c": "temperature.gpu",
}
_PACKAGES = (
    "onnxruntime-gpu",
    "onnx",
    "tensorrt",
    "tensorrt-cu13",
    "tensorrt-rtx-cu13",
    "transformers",
    "triton",
    "nvidia-cudnn-cu13",
    "nvidia-cublas",
    "cuda-bindings",
)


def describe() -> dict[str, Any]:
    """The card, the machine and the versions that matter, as text; without a card, what nvidia-smi says of it."""
    values = _query(",".join(_FIELDS.values()))
    card: dict[str, Any] = {"card": None, "no_card": values} if isinstance(values, str) else {}
    if not isinstance(values, str):
        card = dict(zip(_FIELDS, values, strict=True))
    return card | describe_machine() | {name: version for name in _PACKAGES if (version := _version(name))}


def memory_mib() -> float | None:
    """Memory that is taken on the first card, by whatever process, in MiB; None where it cannot be told."""
    values = _query("memory.used")
    try:
        return None if isinstance(values, str) else float(values[0].split()[0])
    except ValueError:
        return None


def _query(fields: str) -> list[str] | str:
    """The values for the first card, or why there are none."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except FileNotFoundError:
        return "there is no nvidia-smi"
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi does not answer: {error}"
    return [value.strip() for value in answer.stdout.strip().split(",")]


def _version(package: str) -> str:
    """Empty if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
