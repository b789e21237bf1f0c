"""Phases that behave badly, each run in a process of its own by the tests of the runner."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import threading

from diffuserve_bench.gpu.phases import Phase
from diffuserve_bench.gpu.record import PhaseRecord, Skipped
from diffuserve_bench.gpu.settings import Settings
from tests.waiting import LONG_S


def phase(name: str, seconds: float = LONG_S) -> Phase:
    """One of the functions here, by its name."""
    return Phase(name, f"{__name__}:{name}", seconds, "")


def good(settings: Settings, record: PhaseRecord) -> None:
    record.figure("speed", 2.5, "m/s", rows=3)
    print("what a library prints")


def raising(settings: Settings, record: PhaseRecord) -> None:
    record.figure("speed", 1.0, "m/s")
    raise ValueError("no such\n  luck")


def in_parts(settings: Settings, record: PhaseRecord) -> None:
    for part in ("first", "second"):
        with record.part(part=part):
            if part == "first":
                raise ValueError("it broke")
            record.figure("speed", float("nan"), "m/s")


def lacking(settings: Settings, record: PhaseRecord) -> None:
    importlib.import_module("a_package_that_nobody_has")


def unsuitable(settings: Settings, record: PhaseRecord) -> None:
    raise Skipped("there is no wind")


def crashing(settings: Settings, record: PhaseRecord) -> None:
    record.figure("speed", 3.0, "m/s")
    os.kill(os.getpid(), signal.SIGSEGV)


def leaving(settings: Settings, record: PhaseRecord) -> None:
    os._exit(7)


def hanging(settings: Settings, record: PhaseRecord) -> None:
    """Never ends, nor does what it has started; the figure is their process ids."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    record.figure("process", os.getpid(), "")
    record.figure("process", other.pid, "")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Event().wait()
