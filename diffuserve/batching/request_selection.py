"""How servers batch that batch requests and not steps: there so that the gain is measured against a fair opponent on the
same engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from diffuserve.batching.jobs import Job, Latent
from diffuserve.batching.selection import within_budget


class RequestSelection:
    """Request-level: a batch of whole requests runs to its end before the next is put together.

    Args:
        max_rows: rows of one call.
        together: batch requests that agree on shape, sampler, steps and guidance, first come first; otherwise one
            request runs at a time.
    """

    def __init__(self, max_rows: int, *, together: bool) -> None:
        self.max_rows = max_rows
        self.ready_rows = 0
        self._together = together
        self._batch: list[Latent] = []

    def order(self, jobs: Iterable[Job], now_s: float) -> list[Job]:
        return sorted(jobs, key=lambda job: job.arrival_s)

    def select(self, jobs: Sequence[Job], now_s: float) -> list[Latent]:
        self._batch = [latent for latent in self._batch if latent.job in jobs and not latent.finished]
        if not self._batch:
            latents = [latent for job in self.order(jobs, now_s) for latent in job.ready_latents()]
            alike = [latent for latent in latents if self._fits(latent.job, latents[0].job)]
            self._batch = within_budget(alike, self.max_rows)
        if any(latent.running for latent in self._batch):
            return []
        self.ready_rows = sum(latent.rows for latent in self._batch)
        return list(self._batch)

    def account(self, batch: Sequence[Latent], call_s: float) -> None:
        pass

    def _fits(self, job: Job, first: Job) -> bool:
        if not self._together:
            return job is first
        guidance = (job.guidance_scale, job.rows_per_image)
        return (
            job.batch_key == first.batch_key
            and job.trajectory is first.trajectory  # shared by all with the same sampler and steps
            and guidance == (first.guidance_scale, first.rows_per_image)
        )
