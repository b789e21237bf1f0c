"""The processes of a server: which there are, what each runs, and the memory it takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil


def family_of(pid: int) -> list[psutil.Process]:
    """A process and all below it; empty if it is not there."""
    import psutil

    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def model_of(process: psutil.Process) -> str:
    """The model whose model.py a process of Triton's Python backend runs, `worker` for TorchServe's; empty for others.

    Raises:
        psutil.Error: the process has ended; a zombie has no arguments either.
    """
    for argument in process.cmdline():
        if argument.endswith("/model_service_worker.py"):
            return "worker"
        if argument.endswith("/model.py"):
            return Path(argument).parents[1].name
    return ""


def memory_bytes(pid: int, measure: str) -> int:
    """`Rss` or `Pss` of a process, as Linux adds them up; raises `OSError` if the process has ended."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    size = re.search(rf"^{measure}:\s+(\d+) kB", rollup, re.MULTILINE)
    return int(size[1]) * 1024 if size else 0
