"""Whether a request can be finished within its timeout, said when it arrives.

A server that takes everything works, when there is too much, on requests that expire before they are done, and finishes
none. So each request with a timeout is weighed at its arrival: if it could not be finished in time, or another that has
been accepted no longer could, it is refused while its client can still go elsewhere.

The in-flight loop advances everybody by one UNet evaluation in a round of calls. So a request that needs k more takes k
rounds, in each of which those are that need as many, and is late only if what joins makes the rounds longer; which is what
is asked for each newcomer. What a call costs is learnt from the calls: a part for each call and a part that grows with
its rows and their size.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from diffuserve.batching.forecast import CallForecast
from diffuserve.batching.jobs import LatentShape

# Of what the forecast says, for what it cannot know: other programs, and the requests that come without a timeout.
_MARGIN = 1.5


@dataclass(eq=False)
class Promise:
    """An accepted request.

    Attributes:
        shape: (C, h, w) of its latents.
        rows: UNet rows that it takes in a call.
        evaluations_left: UNet evaluations that it still needs.
        priority: 0 (first) .. 9 (last).
        end_s: when it expires, on the clock of `Admission.excess_s`; infinite without a timeout.
    """

    shape: LatentShape
    rows: int
    evaluations_left: int
    priority: int
    end_s: float = math.inf


class Admission:
    """Knows what has been accepted.

    Args:
        max_rows: of one UNet call.
        instances: UNet calls in flight at once.
    """

    def __init__(self, max_rows: int, instances: int = 1) -> None:
        self.calls = CallForecast()
        self.accepted: set[Promise] = set()
        self.outside_s = 0.0
        """What a request takes besides its UNet calls, of late."""
        self._max_rows = max_rows
        self._instances = instances

    def observe_outside(self, seconds: float) -> None:
        """Learns what one request took besides its UNet calls."""
        self.outside_s = seconds if not self.outside_s else 0.9 * self.outside_s + 0.1 * seconds

    def excess_s(self, newcomer: Promise, now_s: float) -> float:
        """Seconds by which the newcomer, or an accepted request that would have been in time without it, would be late;
        0 if none would. A server with nothing to do accepts everything, since its forecast may be out of date."""
        if not self.accepted:
            return 0.0
        excess_s = 0.0
        concerned = [promise for promise in self.accepted if promise.end_s < math.inf]
        for priority in sorted({promise.priority for promise in (*concerned, newcomer)}):
            if priority < newcomer.priority:  # goes first in any case
                continue
            rivals = [promise for promise in self.accepted if promise.priority <= priority]
            before_s, after_s = self._rounds_s(rivals), self._rounds_s([*rivals, newcomer])
            if priority == newcomer.priority:
                excess_s = max(excess_s, self._late_s(newcomer, after_s, now_s))
            for promise in concerned:
                if promise.priority == priority and self._late_s(promise, before_s, now_s) <= 0:
                    excess_s = max(excess_s, self._late_s(promise, after_s, now_s))
        return excess_s

    def _late_s(self, promise: Promise, rounds_s: Mapping[int, float], now_s: float) -> float:
        """Seconds after its end at which `promise` will be finished; negative if before."""
        needed_s = _MARGIN * (rounds_s[promise.evaluations_left] + self.outside_s)
        return now_s + needed_s - promise.end_s

    def _rounds_s(self, present: Iterable[Promise]) -> dict[int, float]:
        """Seconds in which those present do so many evaluations each, by their number, for every number that one of them
        needs; who needs fewer is not in the rest of the rounds."""
        by_need: dict[int, list[Promise]] = {0: []}
        for promise in present:
            by_need.setdefault(promise.evaluations_left, []).append(promise)
        needs = sorted(by_need)
        rows: Counter[LatentShape] = Counter()
        lasts_s = {0: 0.0}
        for less, need in reversed([*itertools.pairwise(needs)]):
            for promise in by_need[need]:
                rows[promise.shape] += promise.rows
            lasts_s[need] = (need - less) * self._round_s(rows)
        total_s, finished_s = 0.0, {}
        for need in needs:
            total_s += lasts_s[need]
            finished_s[need] = total_s
        return finished_s

    def _round_s(self, rows: Mapping[LatentShape, int]) -> float:
        """One evaluation of all rows, which share a call if they are of one shape and not too many."""
        calls = sum(math.ceil(count / self._max_rows) for count in rows.values())
        size = sum(count * math.prod(shape) for shape, count in rows.items())
        return self.calls.seconds(calls, size) / self._instances
