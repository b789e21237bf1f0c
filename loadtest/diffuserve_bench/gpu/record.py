"""What a run writes down: one JSON object a line, the moment it is known, into a file and to standard output.

    {"kind": "machine", "card": "NVIDIA H100 80GB HBM3", "driver": "580.159.04", ...}
    {"kind": "phase", "phase": "unet", "state": "begun", "deadline_s": 150.0}
    {"kind": "figure", "phase": "unet", "figure": "call", "value": 4.1, "unit": "ms/row", "settings": {"rows": 8, ...}}
    {"kind": "part", "phase": "unet", "state": "skipped", "reason": "...", "settings": {"engine": "tensorrt", ...}}
    {"kind": "phase", "phase": "unet", "state": "ended", "seconds": 97.2}

A line is one write to a file that is only appended to, so that whoever stops the run, and however, loses none of them. Of a
phase the last state is one of `STATES`; a part has failed or was skipped, and the phase goes on with its next one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

ENDED, SKIPPED, FAILED, DIED, OVERDUE, STOPPED = "ended", "skipped", "failed", "died", "out of time", "stopped"
STATES = (ENDED, SKIPPED, FAILED, DIED, OVERDUE, STOPPED)
_STANDARD_OUTPUT = 1
_REASON_CHARACTERS = 1000


class Skipped(Exception):
    """What is to be measured cannot be measured here; the message says why."""


class Recorder:
    """Writes lines.

    Args:
        path: the file; it is appended to, and its folder made.
        output: a file descriptor that gets the same.
    """

    def __init__(self, path: Path, output: int = _STANDARD_OUTPUT) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        self._output = output

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._file)

    def line(self, kind: str, **fields: Any) -> None:
        """Into the file first. Whoever reads the output may be gone, which ends nothing."""
        data = (json.dumps({"kind": kind, **fields}) + "\n").encode()
        os.write(self._file, data)
        with suppress(OSError):
            os.write(self._output, data)


@dataclass(frozen=True)
class PhaseRecord:
    """What one phase writes with."""

    recorder: Recorder
    phase: str

    def figure(self, name: str, value: float, unit: str, **settings: Any) -> None:
        """A value that is not finite becomes null, as JSON has it."""
        known = value if math.isfinite(value) else None
        self.recorder.line("figure", phase=self.phase, figure=name, value=known, unit=unit, settings=settings)

    @contextmanager
    def part(self, **settings: Any) -> Iterator[None]:
        """What fails within is written down, and the phase goes on behind it."""
        try:
            yield
        except Exception as error:
            self.note(*outcome_of(error), **settings)

    def note(self, part_state: str, part_reason: str, **settings: Any) -> None:
        """A part that was skipped or has failed."""
        self.recorder.line("part", phase=self.phase, state=part_state, reason=_one_line(part_reason), settings=settings)

    def state(self, state: str, **fields: Any) -> None:
        self.recorder.line("phase", phase=self.phase, state=state, **fields)


def outcome_of(error: BaseException) -> tuple[str, str]:
    """The state that an exception means, and the reason in words."""
    if isinstance(error, ModuleNotFoundError):
        return SKIPPED, f"needs {error.name}, which is not installed"
    skipped = isinstance(error, Skipped)
    reason = str(error) if skipped else f"{type(error).__name__}: {error}"
    return SKIPPED if skipped else FAILED, _one_line(reason)


def _one_line(reason: str) -> str:
    return " ".join(reason.split())[:_REASON_CHARACTERS]


def read_lines(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The lines of several files, one file after another. A last line that was cut short is left out."""
    lines = []
    for path in paths:
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                continue
    return lines
