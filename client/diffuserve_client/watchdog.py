"""A limit on how long a blocking call may wait, for calls that have no timeout of their own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType


class Watchdog:
    """Calls `expire` once when a single wait, marked by `waiting()`, takes longer than `limit_s`; None means never.

    Its thread sleeps until the current wait would expire, however many waits there are.
    """

    def __init__(self, limit_s: float | None, expire: Callable[[], object]) -> None:
        self.expired = False
        self._limit_s = limit_s
        self._expire = expire
        self._waiting_since: float | None = None
        self._closed = threading.Event()

    def __enter__(self) -> Watchdog:
        if self._limit_s is not None:
            threading.Thread(target=self._watch, args=(self._limit_s,), name="diffuserve-watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Marks a wait."""
        self._waiting_since = time.monotonic()
        try:
            yield
        finally:
            self._waiting_since = None

    def _watch(self, limit_s: float) -> None:
        sleep_s = limit_s
        while not self._closed.wait(sleep_s):
            since = self._waiting_since
            waited_s = 0.0 if since is None else time.monotonic() - since
            if waited_s >= limit_s:
                self.expired = True
                self._expire()
                return
            sleep_s = limit_s - waited_s
