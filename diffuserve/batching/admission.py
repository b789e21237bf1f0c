"""Whether a request can be finished within its timeout, decided when it arrives.

An overloaded server that accepts everything spends its time on requests that expire before they are done. So each request
with a timeout is checked on arrival. If it could not finish in time, or if it would make an accepted request late, it is
refused at once, and its client can go elsewhere.

The forecast is simple, because the in-flight loop advances every request by one UNet evaluation per round of calls. A
request that needs k more evaluations takes k rounds. What joins it makes those rounds longer, and nothing else makes it
late. What a call costs is learnt from past calls: a fixed part, and a part that grows with its rows and their size.

Not modelled: the policy and clients, which decide who goes first within a priority; batches below the row budget; calls of
one round that take unlike long, as of large and small images on two instances; the longer prompt's part in what a call
costs; whole requests as batches (`batching = request` and `none`), whose rounds nobody joins.

Other models may share the device (`diffuserve.batching.load`). Their work delays the requests of this one, and each of its
calls takes longer while they have work. So what a call costs is what it would take alone.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from diffuserve.batching.forecast import CallForecast
from diffuserve.batching.jobs import LatentShape
from diffuserve.batching.ledger import Entry, Ledger
from diffuserve.batching.load import Due, Load, Neighbours, share_beside, shared_s

# Of what the forecast says, for what it cannot know: other programs, and the requests that come without a timeout.
_MARGIN = 1.5
# Between two requests the other models hear of progress no more often than this.
_TELL_EVERY_S = 0.05
# Of the requests that may expire, the other models hear of those that have the least time to spare.
_MOST_DUE = 256


class Admission:
    """Weighs a request against those that have been accepted.

    Args:
        ledger: what has been accepted.
        max_rows: of one UNet call.
        instances: UNet calls in flight at once.
        neighbours: the other models on the same device; None if there are none.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        ledger: Ledger,
        max_rows: int,
        instances: int = 1,
        neighbours: Neighbours | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.calls = CallForecast()
        self._ledger = ledger
        self.outside_s = 0.0
        """What a request takes besides its UNet calls, of late."""
        self._max_rows = max_rows
        self._instances = instances
        self._neighbours = neighbours
        self._clock = clock
        self._told = Load(told_s=clock())
        self._others: Sequence[Load] = ()
        # When a call's cost was last learnt, and for how long the others had been busy by then, all of them together.
        self._learnt_s, self._others_busy_s = clock(), 0.0

    @property
    def requests_elsewhere(self) -> int:
        """What the other models had to do when they were last asked."""
        return sum(load.requests for load in self._others)

    def tell(self) -> None:
        """Lets the other models know what there is to do; to be called whenever the ledger has changed."""
        if self._neighbours is None:
            return
        if not self._told.requests:
            self._others_of_late()  # how many there were while this model had nothing to do is of no interest
        now_s = self._clock()
        due = []
        for priority in {entry.priority for entry in self._ledger if entry.end_s < math.inf}:
            rounds_s = self._rounds_s(self._up_to(priority))
            due += [
                Due(rounds_s[entry.evaluations_left], entry.end_s)
                for entry in self._ledger
                if entry.priority == priority and entry.end_s < math.inf
            ]
        first = heapq.nsmallest(_MOST_DUE, due, key=lambda each: each.end_s - each.seconds)
        busy_s = self._told.busy_until_s(now_s)
        self._told = Load(len(self._ledger), self._all_s(self._ledger), self.outside_s, tuple(first), busy_s, now_s)
        self._neighbours.publish(self._told)

    def observe_call(self, size: int, seconds: float) -> None:
        """Learns from one UNet call of `size` latent values that took so many seconds."""
        self.calls.observe(size, seconds * share_beside(self._others_of_late()))
        if self._clock() - self._told.told_s >= _TELL_EVERY_S:
            self.tell()

    def observe_outside(self, seconds: float) -> None:
        """Learns what one request took besides its UNet calls."""
        self.outside_s = seconds if not self.outside_s else 0.9 * self.outside_s + 0.1 * seconds

    def excess_s(self, newcomer: Entry, now_s: float) -> float:
        """Seconds by which the newcomer, or an accepted request that could have been in time without it, here or of another
        model, would be late; 0 if none would. A model with nothing to do accepts what would be late even without the others,
        since its forecast may be out of date."""
        if self._neighbours is not None:
            self._others = [load for load in self._neighbours.loads() if load.requests]
        accepted = list(self._ledger)
        if not accepted and not self._others:
            return 0.0
        alone_s = self._rounds_s([newcomer])[newcomer.evaluations_left] + self.outside_s
        if not accepted and _late_s(alone_s, newcomer.end_s, now_s) > 0:
            return 0.0
        excess_s = self._excess_elsewhere_s(newcomer, now_s)
        concerned = [entry for entry in accepted if entry.end_s < math.inf]
        for priority in sorted({entry.priority for entry in (*concerned, newcomer)}):
            if priority < newcomer.priority:  # goes first in any case
                continue
            rivals = self._up_to(priority)
            before_s, after_s = self._rounds_s(rivals), self._rounds_s([*rivals, newcomer])
            if priority == newcomer.priority:
                excess_s = max(excess_s, _late_s(self._needed_s(newcomer, after_s), newcomer.end_s, now_s))
            for entry in concerned:
                if entry.priority == priority:
                    needed_before_s, needed_s = self._needed_s(entry, before_s), self._needed_s(entry, after_s)
                    excess_s = max(excess_s, _made_late_s(needed_before_s, needed_s, entry.end_s, now_s))
        return excess_s

    def _excess_elsewhere_s(self, newcomer: Entry, now_s: float) -> float:
        """As `excess_s`, of what the other models have accepted."""
        if not self._others:
            return 0.0
        before_s, after_s = self._all_s(self._ledger), self._all_s([*self._ledger, newcomer])
        excess_s = 0.0
        for number, load in enumerate(self._others):
            rest_s = [other.seconds for other in (*self._others[:number], *self._others[number + 1 :])]
            for due in load.due:
                needed_before_s, needed_s = (
                    shared_s(due.seconds, (own_s, *rest_s)) + load.outside_s for own_s in (before_s, after_s)
                )
                excess_s = max(excess_s, _made_late_s(needed_before_s, needed_s, due.end_s, now_s))
        return excess_s

    def _needed_s(self, entry: Entry, rounds_s: Mapping[int, float]) -> float:
        """Seconds until `entry` will be finished beside what the other models have to do."""
        return shared_s(rounds_s[entry.evaluations_left], [load.seconds for load in self._others]) + self.outside_s

    def _others_of_late(self) -> float:
        """How many other models had work since this was last asked, in the mean."""
        if self._neighbours is None:
            return 0.0
        loads, now_s = self._neighbours.loads(), self._clock()
        busy_s = sum(load.busy_until_s(now_s) for load in loads)
        elapsed_s, added_s = now_s - self._learnt_s, busy_s - self._others_busy_s
        self._learnt_s, self._others_busy_s = now_s, busy_s
        return min(max(added_s / elapsed_s, 0.0), len(loads)) if elapsed_s > 0 else 0.0

    def _up_to(self, priority: int) -> list[Entry]:
        """Those that a request of this priority does not go before."""
        return [entry for entry in self._ledger if entry.priority <= priority]

    def _all_s(self, present: Iterable[Entry]) -> float:
        """Seconds in which those present are finished."""
        return max(self._rounds_s(present).values())

    def _rounds_s(self, present: Iterable[Entry]) -> dict[int, float]:
        """Seconds in which those present do so many evaluations each, by their number, for every number that one of them
        needs; who needs fewer is not in the rest of the rounds."""
        by_need: dict[int, list[Entry]] = {0: []}
        for entry in present:
            by_need.setdefault(entry.evaluations_left, []).append(entry)
        needs = sorted(by_need)
        images: defaultdict[tuple[LatentShape, int], Counter[int]] = defaultdict(Counter)
        lasts_s = {0: 0.0}
        for less, need in reversed([*itertools.pairwise(needs)]):
            for entry in by_need[need]:
                images[entry.shape, entry.chunks][entry.rows_per_image] += entry.images
            lasts_s[need] = (need - less) * self._round_s(images)
        total_s, finished_s = 0.0, {}
        for need in needs:
            total_s += lasts_s[need]
            finished_s[need] = total_s
        return finished_s

    def _round_s(self, images: Mapping[tuple[LatentShape, int], Mapping[int, int]]) -> float:
        """Seconds of one evaluation of all images. They are given by what those must agree on that share a call, the shape and
        the chunks of the prompt as in `BatchKey`, and then counted by their rows."""
        calls = size = 0
        for (shape, _), counts in images.items():
            rows = sum(each * count for each, count in counts.items())
            calls += max(
                math.ceil(rows / self._max_rows),
                # The rows of an image stay together. Where not even one fits, the loop refuses it.
                *(math.ceil(count / max(1, self._max_rows // each)) for each, count in counts.items()),
            )
            size += rows * math.prod(shape)
        # A call runs on one instance.
        return self.calls.seconds(calls, size) / min(calls, self._instances)


def _late_s(needed_s: float, end_s: float, now_s: float) -> float:
    """Seconds after its end at which a request that needs so many would be finished, with the margin; negative if before."""
    return now_s + _MARGIN * needed_s - end_s


def _made_late_s(before_s: float, after_s: float, end_s: float, now_s: float) -> float:
    """Seconds by which a request would be late that needs `after_s` seconds beside a newcomer, and `before_s` without; 0 if it
    would be in time, or late in any case."""
    if after_s <= before_s or now_s + before_s > end_s:
        return 0.0
    return max(0.0, _late_s(after_s, end_s, now_s))
