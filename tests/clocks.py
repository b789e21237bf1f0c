"""A clock that a test moves, so that a timeout passes because the test says so and not because the machine is slow."""

from __future__ import annotations

import asyncio
import asyncio.events
import time
from collections.abc import Coroutine
from typing import Any, TypeVar
from unittest import mock

Result = TypeVar("Result")


class Clock:
    """Seconds, given when called. It stands still until it is moved on, or `run`."""

    def __init__(self) -> None:
        self._now_s = 1000.0
        self._running_since_s: float | None = None

    def __call__(self) -> float:
        running_s = 0.0 if self._running_since_s is None else time.monotonic() - self._running_since_s
        return self._now_s + running_s

    def advance(self, seconds: float) -> None:
        self._now_s += seconds

    def run(self) -> None:
        """From now on it goes as clocks do."""
        if self._running_since_s is None:
            self._running_since_s = time.monotonic()


class _Loop(asyncio.SelectorEventLoop):
    """An event loop whose timers go by `clock`."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def time(self) -> float:
        return self.clock()


def run_by(clock: Clock, main: Coroutine[Any, Any, Result]) -> Result:
    """As `asyncio.run`, with all timeouts by the clock."""
    with mock.patch.object(asyncio.events, "new_event_loop", lambda: _Loop(clock)):
        return asyncio.run(main)


def running_clock() -> Clock:
    """That of the event loop which runs here."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, _Loop)
    return loop.clock
