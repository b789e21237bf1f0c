"""An open loop: requests are sent when they are due, whether or not earlier ones have been answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffuserve_bench.mixture import Arrival
from diffuserve_loadtest.sending.records import LATE_S

if TYPE_CHECKING:
    from diffuserve.triton.launcher import TritonServer


@dataclass(frozen=True)
class Answered:
    """What became of a list of arrivals.

    `latency_s`: from when each was due to its images, so that a client that was late does not flatter the server;
    `duration_s`: from the start to the last answer; `late`: how many were sent more than `LATE_S` after they were due.
    """

    latency_s: list[float]
    duration_s: float
    late: int

    @property
    def throughput_per_s(self) -> float:
        return len(self.latency_s) / self.duration_s


def answer_all(server: TritonServer, arrivals: Sequence[Arrival]) -> Answered:
    """Sends every request to a server at its time and waits for all answers.

    Raises:
        DiffuserveError: the server refused or failed one; the others are given up.
    """

    async def run() -> Answered:
        from diffuserve_client import AsyncClient

        async with AsyncClient(server.address.grpc, retries=0) as client:
            return await answered(arrivals, lambda arrival: client.generate(**arrival.kind.fields(arrival.seed)))

    return asyncio.run(run())


async def answered(
    arrivals: Sequence[Arrival],
    answer: Callable[[Arrival], Awaitable[object]],
    now_s: Callable[[], float] = time.perf_counter,
) -> Answered:
    """Has every request answered from the time on that it is due.

    Args:
        arrivals: in any order.
        answer: whatever it raises ends the others too.
        now_s: a clock that goes on with the event loop's.
    """
    started_s = now_s()

    async def one(arrival: Arrival) -> tuple[float, float]:
        """Latency and lateness."""
        due_s = started_s + arrival.at_s
        await asyncio.sleep(due_s - now_s())
        sent_s = now_s()
        await answer(arrival)
        return now_s() - due_s, sent_s - due_s

    tasks = [asyncio.create_task(one(arrival)) for arrival in arrivals]
    try:
        outcomes = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return Answered(
        [latency_s for latency_s, _ in outcomes],
        now_s() - started_s,
        sum(late_s > LATE_S for _, late_s in outcomes),
    )
