"""An open loop: requests are sent when they are due, whether or not earlier ones have been answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from diffuserve.triton.launcher import TritonServer
from diffuserve_client import AsyncClient
from diffuserve_loadtest.bench.mixture import Arrival
from diffuserve_loadtest.records import LATE_S


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
    """Sends every request at its time and waits for all answers.

    Raises:
        DiffuserveError: the server refused or failed one; the others are given up.
    """
    return asyncio.run(_answer_all(server, arrivals))


async def _answer_all(server: TritonServer, arrivals: Sequence[Arrival]) -> Answered:
    async with AsyncClient(server.address.grpc, retries=0) as client:
        started_s = time.perf_counter()

        async def one(arrival: Arrival) -> tuple[float, float]:
            """Latency and lateness."""
            due_s = started_s + arrival.at_s
            await asyncio.sleep(due_s - time.perf_counter())
            sent_s = time.perf_counter()
            await client.generate(**arrival.kind.fields(arrival.seed))
            return time.perf_counter() - due_s, sent_s - due_s

        tasks = [asyncio.create_task(one(arrival)) for arrival in arrivals]
        try:
            outcomes = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        duration_s = time.perf_counter() - started_s
    return Answered(
        [latency_s for latency_s, _ in outcomes], duration_s, sum(late_s > LATE_S for _, late_s in outcomes)
    )
