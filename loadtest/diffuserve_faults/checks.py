"""What must be as before when a fault is over."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffuserve.serving.process import SHARED_MEMORY
from diffuserve.triton.address import TritonAddress
from diffuserve.triton.launcher import TritonServer
from diffuserve_client import AsyncClient
from diffuserve_faults.case import Trial
from diffuserve_faults.known_answers import ask
from diffuserve_faults.tally import Tally
from diffuserve_loadtest.server.processes import family_of, model_of

_GAUGES = ("requests_waiting", "requests_running", "rows_waiting", "rows_running")
_SETTLE_S = 60.0
# Triton opens some of its own when it first needs them.
_FILES_SLACK = 2
_MEMORY_GROWTH = 1.1
# Below this a tenth is no more than what the allocator's rounding does to a small process.
_MEMORY_SLACK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Snapshot:
    """Of each process of a server, by model: open files, and resident bytes without the pools of shared memory, which grow
    to the largest that was in them and stay; `pools_bytes` is what those take."""

    files: Mapping[str, int]
    memory_bytes: Mapping[str, int]
    pools_bytes: int


def processes_by_name(server: TritonServer) -> dict[str, Any]:
    """psutil's processes: `tritonserver`, and each model's by its name."""
    import psutil

    root, *below = family_of(server.pid)
    processes = {"tritonserver": root}
    for process in below:
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie's too: one that Triton left when it was killed
            if model := model_of(process):
                processes[model] = process
    return processes


def take_snapshot(server: TritonServer) -> Snapshot:
    """Raises psutil's error if a process ends meanwhile."""
    processes = processes_by_name(server)
    return Snapshot(
        {name: process.num_fds() for name, process in processes.items()},
        {name: _resident_bytes(process.pid) for name, process in processes.items()},
        pools_bytes(server.address),
    )


def shared_memory_left(address: TritonAddress) -> list[Path]:
    """Files in shared memory of servers that this process has started at an address."""
    return list(SHARED_MEMORY.glob(f"diffuserve_{os.getpid()}_{address.grpc_port}_*"))


def pools_bytes(address: TritonAddress) -> int:
    """What those take."""
    return sum(path.stat().st_blocks * 512 for path in shared_memory_left(address))


def _resident_bytes(pid: int) -> int:
    """Without shared memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssFile:")))


def differences(trial: Trial, before: Snapshot) -> list[str]:
    """What is not as it was: nothing runs, the files and memory are back, and a known image is drawn right. Waits for
    up to a minute until that is so."""
    server = trial.server
    if not server.running:
        return ["the server is not running"]
    wrong = _known_image_wrong(trial)
    end_s = time.monotonic() + _SETTLE_S
    while True:
        found = wrong + _busy(trial) + _grown(take_snapshot(server), before, trial.files_left)
        if not found or time.monotonic() > end_s:
            return found
        time.sleep(0.25)


def _known_image_wrong(trial: Trial) -> list[str]:
    tally = Tally()

    async def draw() -> None:
        async with AsyncClient(trial.address.grpc, model=trial.model) as client:
            for known in trial.answers[:3]:
                await ask(client, known, tally, 60.0)

    asyncio.run(draw())
    return [*tally.lost, *(f"a known image: {code}" for code in tally.refused)]


def _busy(trial: Trial) -> list[str]:
    metrics = trial.metrics()
    return [f"{name} is {metrics[name]:g}" for name in _GAUGES if metrics[name]]


def _grown(now: Snapshot, before: Snapshot, files_left: int = 0) -> list[str]:
    grown = []
    for name, count in now.files.items():
        if count > before.files.get(name, count) + _FILES_SLACK + files_left:
            grown.append(f"{name} has {count} open files, {before.files[name]} before")
    for name, size in now.memory_bytes.items():
        earlier = before.memory_bytes.get(name, size)
        if size > max(_MEMORY_GROWTH * earlier, earlier + _MEMORY_SLACK_BYTES):
            grown.append(f"{name} takes {size >> 20} MiB, {earlier >> 20} before")
    return grown
