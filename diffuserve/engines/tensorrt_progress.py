"""The phases of TensorRT's builder as progress bars."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class PhaseBars:
    """A bar for each phase that is under way.

    TensorRT calls from threads of its own. A phase is known by its name, which is unique within one hierarchy of phases
    only, so the same name may be open more than once: it is the latest then that goes on or ends.

    Args:
        open_bar: makes a bar of a name and a number of steps; it has tqdm's `n`, `update` and `close`.
    """

    def __init__(self, open_bar: Callable[[str, int], Any]) -> None:
        self._open_bar = open_bar
        self._bars: dict[str, list[Any]] = {}
        self._lock = threading.Lock()

    def start(self, phase: str, steps: int) -> None:
        with self._lock:
            self._bars.setdefault(phase, []).append(self._open_bar(phase, steps))

    def step(self, phase: str, number: int) -> None:
        """`number`: of the step that is done, from 0."""
        with self._lock:
            if bars := self._bars.get(phase):
                bars[-1].update(max(0, number + 1 - bars[-1].n))

    def finish(self, phase: str) -> None:
        with self._lock:
            if bars := self._bars.get(phase):
                bars.pop().close()


def progress_monitor(library: Any, title: str) -> Any:
    """An `IProgressMonitor` of `library`, the module `tensorrt` or one with the same interface. There are no bars unless
    the standard error stream is a terminal."""
    from tqdm import tqdm

    bars = PhaseBars(lambda phase, steps: tqdm(total=steps, desc=f"{title}: {phase}", leave=False, disable=None))

    class Monitor(library.IProgressMonitor):  # type: ignore[misc]  # untyped
        def __init__(self) -> None:
            super().__init__()  # without it the binding's object does not exist

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            bars.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            bars.step(phase_name, step)
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            bars.finish(phase_name)

    return Monitor()
