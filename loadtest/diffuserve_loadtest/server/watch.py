"""Watches a server from outside while it is under load: its metrics, its processes, its shared memory."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from types import TracebackType

import msgspec

from diffuserve.tensors import STABLE_DIFFUSION
from diffuserve_loadtest.server.metrics import read_text, values_and_buckets
from diffuserve_loadtest.server.processes import family_of, memory_bytes, model_of

INTERVAL_S = 1.0
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux keeps it


class Process(msgspec.Struct, frozen=True):
    """`resident_bytes`: pages in memory, shared ones too; `proportional_bytes`: shared ones divided among their users."""

    resident_bytes: int
    proportional_bytes: int
    open_files: int
    threads: int


class Sample(msgspec.Struct, frozen=True):
    """One look.

    Attributes:
        at_s: seconds since the epoch.
        metrics: by the names of `diffuserve.stats.METRICS`; empty if the server has none or does not answer.
        buckets: of each histogram, cumulative counts by upper bound.
        processes: by what they run; those of one name are added up.
        shared_memory_files: in /dev/shm, whoever uses them.
    """

    at_s: float
    metrics: Mapping[str, float]
    buckets: Mapping[str, Mapping[str, float]]
    processes: Mapping[str, Process]
    shared_memory_files: int

    @property
    def proportional_bytes(self) -> int:
        """Of all processes together."""
        return sum(process.proportional_bytes for process in self.processes.values())


class Watch:
    """A context manager; `samples` grows by one every second while it is entered.

    Args:
        metrics_url: Prometheus text; None for a server that has none.
        pid: of the server's first process, whose children are watched too; None for a server elsewhere.
        model: whose metrics are read.
    """

    def __init__(self, metrics_url: str | None, pid: int | None, model: str = STABLE_DIFFUSION) -> None:
        self._metrics_url = metrics_url
        self._model = model
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="diffuserve-watch", daemon=True)
        self.samples: list[Sample] = []

    def __enter__(self) -> Watch:
        self.samples.append(self.look())
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.samples.append(self.look())

    def look(self) -> Sample:
        """One sample now."""
        metrics: dict[str, float] = {}
        buckets: dict[str, dict[str, float]] = {}
        if self._metrics_url is not None:
            # It may be down or end within its answer, which is one of the things to see.
            with contextlib.suppress(OSError, HTTPException):
                metrics, buckets = values_and_buckets(read_text(self._metrics_url), self._model)
        return Sample(time.time(), metrics, buckets, processes_of(self._pid), _shared_memory_files())

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self.samples.append(self.look())


def processes_of(pid: int | None) -> dict[str, Process]:
    """A process and all below it, by what they run; those that end meanwhile are left out."""
    import psutil

    found: dict[str, Process] = {}
    for process in [] if pid is None else family_of(pid):
        try:
            name = model_of(process) or process.name()
            resident, proportional = (memory_bytes(process.pid, measure) for measure in ("Rss", "Pss"))
            figures = Process(resident, proportional, process.num_fds(), process.num_threads())
        except (psutil.Error, OSError):
            continue
        found[name] = _sum(found[name], figures) if name in found else figures
    return found


def _sum(one: Process, other: Process) -> Process:
    return Process(*(a + b for a, b in zip(msgspec.structs.astuple(one), msgspec.structs.astuple(other), strict=True)))


def _shared_memory_files() -> int:
    return sum(1 for _ in SHARED_MEMORY.iterdir()) if SHARED_MEMORY.is_dir() else 0
