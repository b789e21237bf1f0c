"""A run of a workload inside Locust: what one generator process sends, and when it has ended."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import gevent
from gevent.event import Event
from gevent.pool import Pool

from diffuserve_loadtest.arrivals import due_times
from diffuserve_loadtest.sender import Sender
from diffuserve_loadtest.workload import Workload

_STARTS_TOGETHER_S = 0.5


@dataclass(frozen=True)
class Share:
    """Process `index` of `count` sends every `count`-th request; all begin at `starts_at`, seconds since the epoch."""

    index: int = 0
    count: int = 1
    starts_at: float = 0.0

    @classmethod
    def of_all(cls, count: int) -> list[Share]:
        """One for each process, to begin soon."""
        starts_at = time.time() + _STARTS_TOGETHER_S
        return [cls(index, count, starts_at) for index in range(count)]


class Load:
    """Sends this process's share.

    Attributes:
        unsent: requests that were due and not sent, because `max_in_flight` were.
        ended: set when the duration is over and everything in flight has been answered or given up.
    """

    def __init__(self, workload: Workload, sender: Sender, share: Share) -> None:
        self._workload = workload
        self._sender = sender
        self._share = share
        self._started_s = time.perf_counter() + share.starts_at - time.time()
        self._numbers = itertools.count(share.index, share.count)
        self._in_flight = Pool()
        self.unsent = 0
        self.ended = Event()

    def run_open_loop(self) -> None:
        """Sends each request when it is due, whatever became of the earlier ones."""
        limit = -(-self._workload.max_in_flight // self._share.count)
        for number, due_s in self._due():
            self._sleep_until(due_s)
            if len(self._in_flight) >= limit:
                self.unsent += 1
            else:
                self._in_flight.spawn(self._sender.send, number, self._started_s, due_s)
        self._sleep_until(self._workload.duration_s)
        self._wait_for_the_last()

    def send_next(self) -> bool:
        """A user's turn in a closed loop; False when the time is over."""
        self._sleep_until(0.0)
        if self._now_s() >= self._workload.duration_s:
            return False
        turn = self._in_flight.spawn(self._sender.send, next(self._numbers), self._started_s, None)
        turn.join()
        return True

    def end_closed_loop(self) -> None:
        """Waits for the end of the time, then for the last answers."""
        self._sleep_until(self._workload.duration_s)
        self._wait_for_the_last()

    def _due(self) -> Iterator[tuple[int, float]]:
        everything = enumerate(due_times(self._workload))
        return itertools.islice(everything, self._share.index, None, self._share.count)

    def _wait_for_the_last(self) -> None:
        # Each gives up by itself when its patience is over.
        self._in_flight.join()
        self.ended.set()

    def _now_s(self) -> float:
        return time.perf_counter() - self._started_s

    def _sleep_until(self, at_s: float) -> None:
        # Even for what is overdue, so that answers are read while the generator catches up.
        gevent.sleep(max(0.0, at_s - self._now_s()))
