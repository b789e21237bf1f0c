"""Whether an export has room enough, on disk and in memory, before it begins."""

from __future__ import annotations

import shutil
from pathlib import Path

from diffuserve.errors import BundleError
from diffuserve_export.checkpoint.checkpoint import Checkpoint

# Every weight in fp32, once as exported and once as the engine stores it; graphs, tokenizers and manifest beside.
_DISK_BYTES_PER_PARAMETER = 2 * 4
_DISK_BESIDE_WEIGHTS_BYTES = 100 << 20
# The most is taken while ONNX Runtime optimises and stores the largest component: twice its weights in fp32. Measured:
# 8.0 GB for Stable Diffusion 1.5, whose UNet has 0.86 thousand million parameters, 22.0 GB for XL, with 2.57.
_MEMORY_BYTES_PER_PARAMETER = 2 * 4
_MEMORY_BESIDE_WEIGHTS_BYTES = 1_500_000_000
# Of the parameters of a single file, which does not tell its components apart without being read.
_UNET_SHARE = 0.8
_CGROUP = Path("/sys/fs/cgroup")


def bundle_size_bytes(checkpoint: Checkpoint) -> int:
    """About how large the bundle will be."""
    return _DISK_BYTES_PER_PARAMETER * checkpoint.parameters + _DISK_BESIDE_WEIGHTS_BYTES


def export_memory_bytes(checkpoint: Checkpoint) -> int:
    """About how much memory the export will take at most."""
    if checkpoint.single_file:
        largest = int(_UNET_SHARE * checkpoint.parameters)
    else:
        largest = max(part.parameters for part in checkpoint.weights.values())
    return _MEMORY_BYTES_PER_PARAMETER * largest + _MEMORY_BESIDE_WEIGHTS_BYTES


def check_room(checkpoint: Checkpoint, folder: Path) -> None:
    """Args:
        checkpoint: to be exported.
        folder: on the disk that the bundle will lie on.

    Raises:
        BundleError: the disk or the memory has less room than the export takes.
    """
    needed_bytes, free_bytes = bundle_size_bytes(checkpoint), shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise BundleError(
            f"The bundle takes about {needed_bytes / 1e9:.1f} GB, and the disk of {folder.parent} has "
            f"{free_bytes / 1e9:.1f} GB left. Make room, or name an --output on another disk. No bundle was written."
        )
    needed_bytes, free_bytes = export_memory_bytes(checkpoint), available_memory_bytes()
    if free_bytes < needed_bytes:
        raise BundleError(
            f"The export takes about {needed_bytes / 1e9:.1f} GB of memory, and {free_bytes / 1e9:.1f} GB are free. Stop "
            "other programs, or export on a larger machine and copy the bundle: it serves with less. No bundle was written."
        )


def available_memory_bytes() -> int:
    """What this process may still take: of the machine's memory, and within the limit of its container."""
    import psutil

    machine = int(psutil.virtual_memory().available)
    try:
        limit = int((_CGROUP / "memory.max").read_text())  # raises for "max": no limit
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return machine
    # Pages of files that were read are counted as used, and given up when memory is short.
    return min(machine, limit - used + int(stat.get("inactive_file", 0)))
