"""The process of one phase: python -m diffuserve_bench.gpu.child PHASE TARGET OUTPUT SETTINGS.

It ends with the process that started it, also when that one is killed: its standard input ends then. What libraries print
goes to standard error, and standard output has nothing but the record.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from diffuserve_bench.gpu.record import ENDED, FAILED, PhaseRecord, Recorder, outcome_of
from diffuserve_bench.gpu.settings import Settings


def main(phase: str, target: str, output: str, settings: str) -> None:
    """Runs the phase and writes down how it ended; exit code 0 says that it did."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    standard_output = os.dup(1)
    os.dup2(2, 1)
    with Recorder(Path(output), standard_output) as recorder:
        record = PhaseRecord(recorder, phase)
        started_s = time.monotonic()
        module, _, function = target.partition(":")
        try:
            getattr(importlib.import_module(module), function)(Settings.from_json(json.loads(settings)), record)
            state, reason = ENDED, ""
        except Exception as error:
            state, reason = outcome_of(error)
            if state == FAILED:
                traceback.print_exc()
        seconds = round(time.monotonic() - started_s, 1)
        record.state(state, seconds=seconds, **({"reason": reason} if reason else {}))
    # At its end an interpreter may wait for threads of libraries, or crash in them; everything is written down.
    sys.stderr.flush()
    os._exit(0)


def _end_with_parent() -> None:
    """Waits until the parent is gone, and kills this process and all that it has started: its session."""
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
