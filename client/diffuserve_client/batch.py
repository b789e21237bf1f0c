"""Many requests at once, so that they share the server's batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from diffuserve.errors import DiffuserveError

if TYPE_CHECKING:
    from typing import Unpack

    from diffuserve.description import Description
    from diffuserve.request import RequestFields
    from diffuserve_client.result import Progress, Result

# Enough to fill a server's batch, and far from its queue's limit.
MAX_CONCURRENT_REQUESTS = 32


class TextToImage(Protocol):
    """What `Client` and `LocalClient` have in common."""

    def generate(
        self,
        prompt: str,
        *,
        on_progress: Callable[[Progress], object] | None = None,
        **fields: Unpack[RequestFields],
    ) -> Result: ...

    def describe(self) -> Description: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Job:
    """One request: `index` is its place in the run; seed None lets the server draw one."""

    index: int
    prompt: str
    seed: int | None


def send_all(
    client: TextToImage,
    jobs: Sequence[Job],
    fields: RequestFields,
    *,
    on_progress: Callable[[Job, Progress], None],
    on_end: Callable[[Job, Result | DiffuserveError], None],
) -> None:
    """Sends all jobs, at most `MAX_CONCURRENT_REQUESTS` at a time, and returns when all have ended.

    One job's failure leaves the others alone. An interrupt closes the client, which cancels what still runs.

    Args:
        client: safe to call from several threads.
        jobs: what to draw.
        fields: what they have in common.
        on_progress: called in the jobs' threads.
        on_end: called in this thread, once a job, in the order in which they end.
    """

    def work(job: Job) -> Result:
        settings: RequestFields = {**fields, "seed": job.seed}
        return client.generate(job.prompt, on_progress=lambda event: on_progress(job, event), **settings)

    with ThreadPoolExecutor(min(len(jobs), MAX_CONCURRENT_REQUESTS), thread_name_prefix="request") as pool:
        futures = {pool.submit(work, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                job = futures.pop(future)
                try:
                    outcome: Result | DiffuserveError = future.result()
                except DiffuserveError as error:
                    outcome = error
                on_end(job, outcome)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            client.close()
            raise
