"""A run of a workload inside Locust: what one generator process sends, and when it has ended."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import gevent
from gevent.event import Event
from gevent.pool import Pool

from diffuserve_loadtest.sending.sender import Sender
from diffuserve_loadtest.workload.arrivals import Closed
from diffuserve_loadtest.workload.due_times import due_times
from diffuserve_loadtest.workload.workload import Workload

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
        sent_for_s: seconds of the run in which requests were sent: the workload's, unless it was stopped or had sent all.
        ended: set when the duration is over and everything in flight has been answered or given up, or when it was stopped.
    """

    def __init__(self, workload: Workload, sender: Sender, share: Share) -> None:
        self._workload = workload
        self._sender = sender
        self._share = share
        self._started_s = time.perf_counter() + share.starts_at - time.time()
        self._numbers = _numbers(workload, share)
        self._all_sent = Event()
        self._in_flight = Pool()
        self.unsent = 0
        self.sent_for_s = workload.duration_s
        self.ended = Event()
        run = self._wait_for_the_last if isinstance(workload.arrivals, Closed) else self._run_open_loop
        self._running = gevent.spawn(run)

    def send_next(self) -> bool:
        """A user's turn in a closed loop; False when the time is over or all has been sent."""
        self._sleep_until(0.0)
        if self.ended.is_set() or self._now_s() >= self._workload.duration_s:
            return False
        number = next(self._numbers, None)
        if number is None:
            self._all_sent.set()
            return False
        turn = self._in_flight.spawn(self._sender.send, number, self._started_s, None)
        turn.join()
        return True

    def stop(self) -> None:
        """Sends nothing more, and hangs up on what is in flight, which leaves no records."""
        if self.ended.is_set():
            return
        self.sent_for_s = max(0.0, min(self.sent_for_s, self._now_s()))
        self.ended.set()
        self._running.kill()
        self._in_flight.kill()

    def _run_open_loop(self) -> None:
        """Sends each request when it is due, whatever became of the earlier ones."""
        limit = -(-self._workload.max_in_flight // self._share.count)
        for number, due_s in self._due():
            self._sleep_until(due_s)
            if len(self._in_flight) >= limit:
                self.unsent += 1
            else:
                self._in_flight.spawn(self._sender.send, number, self._started_s, due_s)
        self._wait_for_the_last()

    def _wait_for_the_last(self) -> None:
        """Until the time is over, or all has been sent, and everything has been answered; in a closed loop users send
        meanwhile."""
        if self._all_sent.wait(max(0.0, self._workload.duration_s - self._now_s())):
            self.sent_for_s = min(self.sent_for_s, self._now_s())
        # Each gives up by itself when its patience is over.
        self._in_flight.join()
        self.ended.set()

    def _due(self) -> Iterator[tuple[int, float]]:
        everything = enumerate(due_times(self._workload))
        return itertools.islice(everything, self._share.index, None, self._share.count)

    def _now_s(self) -> float:
        return time.perf_counter() - self._started_s

    def _sleep_until(self, at_s: float) -> None:
        # Even for what is overdue, so that answers are read while the generator catches up.
        gevent.sleep(max(0.0, at_s - self._now_s()))


def _numbers(workload: Workload, share: Share) -> Iterator[int]:
    """Of the requests of a process in a closed loop."""
    most = workload.arrivals.requests if isinstance(workload.arrivals, Closed) else None
    return itertools.count(share.index, share.count) if most is None else iter(range(share.index, most, share.count))
