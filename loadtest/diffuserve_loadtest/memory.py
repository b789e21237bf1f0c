"""Memory of a server's processes, from /proc."""

from __future__ import annotations

import re
from pathlib import Path


def resident_bytes(root_pid: int) -> dict[str, int]:
    """Of tritonserver and of each model's process, by name; a process that ends meanwhile is left out."""
    return _memory_bytes(root_pid, "Rss")


def proportional_bytes(root_pid: int) -> dict[str, int]:
    """The same with pages that several processes share divided among them (PSS), also of TorchServe and its `worker`."""
    return _memory_bytes(root_pid, "Pss")


def _memory_bytes(root_pid: int, measure: str) -> dict[str, int]:
    parents = {int(path.name): _parent(path) for path in Path("/proc").iterdir() if path.name.isdigit()}
    sizes: dict[str, int] = {}
    for pid in parents:
        if pid == root_pid or parents[pid] == root_pid:
            try:
                name = "tritonserver" if pid == root_pid else _model(Path(f"/proc/{pid}"))
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            except OSError:
                continue
            size = re.search(rf"^{measure}:\s+(\d+) kB", rollup, re.MULTILINE)
            if name and size:
                sizes[name] = sizes.get(name, 0) + int(size[1]) * 1024
    return sizes


def _parent(process: Path) -> int:
    try:
        # The name in parentheses may itself hold spaces and parentheses.
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def _model(process: Path) -> str:
    """The model whose model.py a Python backend's process of Triton runs, `worker` for TorchServe's; empty for others."""
    for argument in (process / "cmdline").read_bytes().decode(errors="replace").split("\0"):
        if argument.endswith("/model_service_worker.py"):
            return "worker"
        if argument.endswith("/model.py"):
            return Path(argument).parents[1].name
    return ""
