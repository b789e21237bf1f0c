"""Memory of a server's processes, by what they run."""

from __future__ import annotations

from diffuserve_loadtest.server.processes import family_of, memory_bytes, model_of


def resident_bytes(root_pid: int) -> dict[str, int]:
    """Of tritonserver and of each model's process, by name; a process that ends meanwhile is left out."""
    return _memory_bytes(root_pid, "Rss")


def proportional_bytes(root_pid: int) -> dict[str, int]:
    """The same with pages that several processes share divided among them (PSS), also of TorchServe and its `worker`."""
    return _memory_bytes(root_pid, "Pss")


def _memory_bytes(root_pid: int, measure: str) -> dict[str, int]:
    import psutil

    sizes: dict[str, int] = {}
    for process in family_of(root_pid):
        try:
            name = "tritonserver" if process.pid == root_pid else model_of(process)
            size = memory_bytes(process.pid, measure)
        except (psutil.Error, OSError):
            continue
        if name and size:
            sizes[name] = sizes.get(name, 0) + size
    return sizes
