"""What goes into the next UNet call.

`InflightSelection` decides anew at every step. `RequestSelection` decides when a whole batch has ended, as servers do
that batch requests and not steps; it is there so that the gain is measured against a fair opponent on the same engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from diffuserve.batching.costs import CallCosts
from diffuserve.batching.jobs import BatchKey, Job, Latent
from diffuserve.batching.policies import Policy
from diffuserve.batching.shares import Shares

# A priority level of which nothing has run for this long counts as one level more urgent, for every such time. So the
# lowest gets a call at least every nine times this long, whatever comes in above it, besides the rows that the more
# urgent leave free in every call.
PRIORITY_AGEING_S = 10.0


class Selection(Protocol):
    """Chooses latents for a call.

    `max_rows`: rows of one call, at most. `ready_rows`: how many rows were ready for the call chosen last, of its key.
    """

    max_rows: int
    ready_rows: int

    def order(self, jobs: Iterable[Job], now_s: float) -> list[Job]:
        """Jobs in the order in which they are admitted."""
        ...

    def select(self, jobs: Sequence[Job], now_s: float) -> list[Latent]:
        """The latents of the next call, all with the same `Job.batch_key` and together at most `max_rows` rows; empty
        if none is due."""
        ...

    def account(self, batch: Sequence[Latent], call_s: float) -> None:
        """Notes that a call of `batch` took `call_s` seconds."""
        ...


class InflightSelection:
    """Step-level: at every step, by priority, then by client, then by policy.

    Args:
        max_rows: rows of one call, at least 2.
        policy: the order within a priority and client; see `diffuserve.batching.policies`.
        costs: measured cost of a call by rows. The row budget is the number up to `max_rows` with most rows per second,
            and of what is ready within it the batch with most rows per second is taken.
    """

    def __init__(self, max_rows: int, policy: Policy, costs: CallCosts | None = None) -> None:
        self._costs = costs or CallCosts({})
        self.max_rows = self._costs.best(range(min(2, max_rows), max_rows + 1))
        self.ready_rows = 0
        self._policy = policy
        self._key_time = Shares()
        self._client_rows = Shares()
        self._level_ran_s: dict[int, float] = {}

    def order(self, jobs: Iterable[Job], now_s: float) -> list[Job]:
        def key(job: Job) -> tuple[int, float, float]:
            return self._urgency(job, now_s), self._client_rows.attained(job.client_id), self._policy(job, now_s)

        return sorted(jobs, key=key)

    def select(self, jobs: Sequence[Job], now_s: float) -> list[Latent]:
        self._key_time.keep(job.batch_key for job in jobs)
        self._client_rows.keep(job.client_id for job in jobs)
        self._level_ran_s = {job.priority: self._level_ran_s.get(job.priority, now_s) for job in jobs}
        ready: dict[BatchKey, list[Latent]] = {}
        for job in self.order(jobs, now_s):
            for latent in job.ready_latents():
                ready.setdefault(job.batch_key, []).append(latent)
        if not ready:
            return []
        candidates = ready[self._next_key(ready, now_s)]
        self.ready_rows = sum(latent.rows for latent in candidates)
        batch = within_budget(candidates, self.max_rows)
        ends, rows = [], 0
        for latent in batch:
            rows += latent.rows
            ends.append(rows)
        batch = batch[: ends.index(self._costs.best(ends)) + 1]
        self._level_ran_s.update((latent.job.priority, now_s) for latent in batch)
        return batch

    def account(self, batch: Sequence[Latent], call_s: float) -> None:
        # The images of a key are its tickets: it gets time in proportion to them.
        self._key_time.add(batch[0].job.batch_key, call_s / len(batch))
        for latent in batch:
            self._client_rows.add(latent.job.client_id, latent.rows)

    def _urgency(self, job: Job, now_s: float) -> int:
        unserved_s = now_s - self._level_ran_s.get(job.priority, now_s)
        return job.priority - int(unserved_s / PRIORITY_AGEING_S)

    def _next_key(self, ready: dict[BatchKey, list[Latent]], now_s: float) -> BatchKey:
        """Among the keys that have a most urgent latent, the one that has had the least time for its images: neither
        a small image behind large ones, nor a short prompt behind long ones, nor the reverse, has to wait for more than
        its share."""
        most_urgent = min(self._urgency(latents[0].job, now_s) for latents in ready.values())
        urgent = [key for key, latents in ready.items() if self._urgency(latents[0].job, now_s) == most_urgent]
        return min(urgent, key=self._key_time.attained)


def within_budget(latents: Iterable[Latent], max_rows: int) -> list[Latent]:
    """The first latents that fit together; one that does not fit is passed over for a smaller one behind it."""
    batch, rows = [], 0
    for latent in latents:
        if rows + latent.rows <= max_rows:
            batch.append(latent)
            rows += latent.rows
    return batch
