"""Runs phases one after another, each in a process of its own and for no longer than it may."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from diffuserve_bench.gpu import child
from diffuserve_bench.gpu.phases import Phase
from diffuserve_bench.gpu.record import DIED, OVERDUE, SKIPPED, STOPPED, PhaseRecord, Recorder
from diffuserve_bench.gpu.settings import Settings

# With less than this left a phase is not begun.
_LEAST_S = 1.0
# A process whose kernel hangs may take the driver a while to end. It is not waited for longer.
_KILL_S = 10.0


class Stopped(BaseException):
    """The run is to end now."""


def run(
    phases: Sequence[Phase],
    settings: Settings,
    output: Path,
    seconds: float,
    now_s: Callable[[], float] = time.monotonic,
) -> bool:
    """Runs the phases and writes down what becomes of each.

    Args:
        phases: in their order.
        settings: for all of them.
        output: the record's file; it is appended to.
        seconds: for all of them together.
        now_s: the clock that these are counted on.

    Returns:
        Whether every phase ended by itself; those that were skipped or failed did.

    Raises:
        Stopped: this process got SIGTERM or SIGINT. What ran has been killed.
    """
    end_s = now_s() + seconds
    good = True
    with Recorder(output) as recorder, _stopped_by_signals():
        for phase in phases:
            record = PhaseRecord(recorder, phase.name)
            left_s = end_s - now_s()
            if left_s < _LEAST_S:
                record.state(SKIPPED, reason="no time is left")
                continue
            good &= _run_phase(phase, settings, output, min(left_s, phase.seconds), record)
    return good


def _run_phase(phase: Phase, settings: Settings, output: Path, deadline_s: float, record: PhaseRecord) -> bool:
    record.state("begun", deadline_s=round(deadline_s, 1))
    started_s = time.monotonic()
    with _process(phase, settings, output) as process:
        try:
            code = process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            state, reason = OVERDUE, f"it was killed after {deadline_s:.0f} s"
        except Stopped:
            record.state(STOPPED, seconds=round(time.monotonic() - started_s, 1), reason="the run was stopped")
            raise
        else:
            if code == 0:
                return True
            state, reason = DIED, f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    record.state(state, seconds=round(time.monotonic() - started_s, 1), reason=reason)
    return False


@contextmanager
def _process(phase: Phase, settings: Settings, output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The phase's process, in a session of its own that is killed at the end. As long as this process lives, its standard
    input stays open."""
    arguments = (phase.name, phase.target, str(output), json.dumps(settings.to_json()))
    process = subprocess.Popen(
        [sys.executable, "-m", child.__name__, *arguments], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_KILL_S)
        if process.stdin is not None:
            process.stdin.close()


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGINT raise `Stopped`, once: what is cleaned up behind it is not interrupted."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
