"""A workload's requests before whatever answers them in this process: a loop without a server, maybe in virtual time.

The load generator cannot do that: it sends from other processes, in real time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from diffuserve.batching.jobs import Job, LatentShape
from diffuserve.samplers import NoiseSchedule, trajectory
from diffuserve.stages import Conditioning
from diffuserve_loadtest.sending.records import LATE_S
from diffuserve_loadtest.workload.due_times import due_times
from diffuserve_loadtest.workload.plan import PlannedRequest, plan
from diffuserve_loadtest.workload.workload import Workload

Request = TypeVar("Request")


@dataclass(frozen=True)
class Answered:
    """What became of a workload.

    `requests`: as they were due; `latency_s`: of each, from when it was due to its answer, so that a sender that was late does
    not flatter who answers; `duration_s`: from the start to the last answer; `late`: how many were sent more than `LATE_S`
    after they were due.
    """

    requests: list[PlannedRequest]
    latency_s: list[float]
    duration_s: float
    late: int

    @property
    def throughput_per_s(self) -> float:
        return len(self.latency_s) / self.duration_s


async def open_loop(
    workload: Workload,
    answer: Callable[[PlannedRequest], Awaitable[object]],
    now_s: Callable[[], float] = time.perf_counter,
) -> Answered:
    """Has every request answered from the time on that it is due.

    Args:
        workload: an open loop.
        answer: whatever it raises ends the others too.
        now_s: a clock that goes on with the event loop's.
    """
    started_s = now_s()

    async def one(request: PlannedRequest, due_s: float) -> tuple[float, float]:
        """Latency and lateness."""
        await asyncio.sleep(due_s - now_s())
        sent_s = now_s()
        await answer(request)
        return now_s() - due_s, sent_s - due_s

    due = list(due_times(workload))
    requests = [plan(workload, number) for number in range(len(due))]
    tasks = [asyncio.create_task(one(request, started_s + due_s)) for request, due_s in zip(requests, due, strict=True)]
    try:
        outcomes = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return Answered(
        requests,
        [latency_s for latency_s, _ in outcomes],
        now_s() - started_s,
        sum(late_s > LATE_S for _, late_s in outcomes),
    )


async def closed_loop(
    requests: Iterator[Request], answer: Callable[[Request], Awaitable[object]], *, in_flight: int, count: int
) -> list[float]:
    """Has always `in_flight` requests answered until `count` are done, then cancels the rest.

    Returns:
        When each was done, seconds on the monotonic clock.
    """
    done_s: list[float] = []

    async def user() -> None:
        while len(done_s) < count:
            await answer(next(requests))
            done_s.append(time.perf_counter())

    users = [asyncio.create_task(user()) for _ in range(in_flight)]
    try:
        finished, _ = await asyncio.wait(users, return_when=asyncio.FIRST_COMPLETED)
        for task in finished:
            task.result()
    finally:
        for task in users:
            task.cancel()
        await asyncio.gather(*users, return_exceptions=True)
    return done_s[:count]


def job_of(
    request: PlannedRequest, schedule: NoiseSchedule, shape: LatentShape, text: Conditioning, arrival_s: float
) -> Job:
    """A request as the in-flight loop takes it.

    Args:
        request: its sampler, steps, guidance and seed are taken.
        schedule: the model's.
        shape: (C, h, w) of the latents.
        text: the embedded prompt, and negative prompt, without a batch dimension.
        arrival_s: on the loop's clock.
    """
    fields = request.fields
    return Job(
        trajectory=trajectory(schedule, fields["sampler"], fields["steps"]),
        shape=shape,
        seeds=[fields["seed"]],
        conditioning=text,
        unconditional=text if fields["guidance_scale"] > 1 else None,
        guidance_scale=fields["guidance_scale"],
        priority=5,
        arrival_s=arrival_s,
    )
