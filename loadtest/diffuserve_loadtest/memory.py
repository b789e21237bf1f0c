"""Resident memory of a server's processes, from /proc."""

from __future__ import annotations

import re
from pathlib import Path


def resident_bytes(root_pid: int) -> dict[str, int]:
    """Of the server and of each model's process, by name; a process that ends meanwhile is left out.

    Args:
        root_pid: tritonserver's.
    """
    parents = {int(path.name): _parent(path) for path in Path("/proc").iterdir() if path.name.isdigit()}
    sizes: dict[str, int] = {}
    for pid in parents:
        if pid == root_pid or parents[pid] == root_pid:
            try:
                name = "tritonserver" if pid == root_pid else _model(Path(f"/proc/{pid}"))
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            except OSError:
                continue
            resident = re.search(r"^Rss:\s+(\d+) kB", rollup, re.MULTILINE)
            if name and resident:
                sizes[name] = sizes.get(name, 0) + int(resident[1]) * 1024
    return sizes


def _parent(process: Path) -> int:
    try:
        # The name in parentheses may itself hold spaces and parentheses.
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def _model(process: Path) -> str:
    """The model whose model.py a Python backend's process runs; empty for other processes."""
    for argument in (process / "cmdline").read_bytes().decode(errors="replace").split("\0"):
        if argument.endswith("/model.py"):
            return Path(argument).parents[1].name
    return ""
