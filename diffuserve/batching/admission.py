"""Whether a request can be finished within its timeout, decided when it arrives.

An overloaded server that accepts everything spends its time on requests that expire before they are done. So each request
with a timeout is checked on arrival. If it could not finish in time, or if it would make an accepted request late, it is
refused at once, and its client can go elsewhere.

The forecast is simple, because the in-flight loop advances every request by one UNet evaluation per round of calls. A
request that needs k more evaluations takes k rounds. What joins it makes those rounds longer, and nothing else makes it
late. What a call costs is learnt from past calls: a fixed part, and a part that grows with its rows and their size.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping

from diffuserve.batching.forecast import CallForecast
from diffuserve.batching.jobs import LatentShape
from diffuserve.batching.ledger import Entry, Ledger

# Of what the forecast says, for what it cannot know: other programs, and the requests that come without a timeout.
_MARGIN = 1.5


class Admission:
    """Weighs a request against those that have been accepted.

    Args:
        ledger: what has been accepted.
        max_rows: of one UNet call.
        instances: UNet calls in flight at once.
    """

    def __init__(self, ledger: Ledger, max_rows: int, instances: int = 1) -> None:
        self.calls = CallForecast()
        self._ledger = ledger
        self.outside_s = 0.0
        """What a request takes besides its UNet calls, of late."""
        self._max_rows = max_rows
        self._instances = instances

    def observe_outside(self, seconds: float) -> None:
        """Learns what one request took besides its UNet calls."""
        self.outside_s = seconds if not self.outside_s else 0.9 * self.outside_s + 0.1 * seconds

    def excess_s(self, newcomer: Entry, now_s: float) -> float:
        """Seconds by which the newcomer, or an accepted request that would have been in time without it, would be late;
        0 if none would. A server with nothing to do accepts everything, since its forecast may be out of date."""
        accepted = list(self._ledger)
        if not accepted:
            return 0.0
        excess_s = 0.0
        concerned = [entry for entry in accepted if entry.end_s < math.inf]
        for priority in sorted({entry.priority for entry in (*concerned, newcomer)}):
            if priority < newcomer.priority:  # goes first in any case
                continue
            rivals = [entry for entry in accepted if entry.priority <= priority]
            before_s, after_s = self._rounds_s(rivals), self._rounds_s([*rivals, newcomer])
            if priority == newcomer.priority:
                excess_s = max(excess_s, self._late_s(newcomer, after_s, now_s))
            for entry in concerned:
                if entry.priority == priority and self._late_s(entry, before_s, now_s) <= 0:
                    excess_s = max(excess_s, self._late_s(entry, after_s, now_s))
        return excess_s

    def _late_s(self, entry: Entry, rounds_s: Mapping[int, float], now_s: float) -> float:
        """Seconds after its end at which `entry` will be finished; negative if before."""
        needed_s = _MARGIN * (rounds_s[entry.evaluations_left] + self.outside_s)
        return now_s + needed_s - entry.end_s

    def _rounds_s(self, present: Iterable[Entry]) -> dict[int, float]:
        """Seconds in which those present do so many evaluations each, by their number, for every number that one of them
        needs; who needs fewer is not in the rest of the rounds."""
        by_need: dict[int, list[Entry]] = {0: []}
        for entry in present:
            by_need.setdefault(entry.evaluations_left, []).append(entry)
        needs = sorted(by_need)
        rows: Counter[LatentShape] = Counter()
        lasts_s = {0: 0.0}
        for less, need in reversed([*itertools.pairwise(needs)]):
            for entry in by_need[need]:
                rows[entry.shape] += entry.rows
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
