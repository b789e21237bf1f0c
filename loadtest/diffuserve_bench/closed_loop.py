"""A closed loop: a fixed number of requests in flight, each answered one followed by the next."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from diffuserve_loadtest.report.summary import throughput

if TYPE_CHECKING:
    from diffuserve.triton.launcher import TritonServer
    from diffuserve_client import AsyncClient

Request = TypeVar("Request")


async def completions(
    answer: Callable[[Request], Awaitable[object]], requests: Iterator[Request], *, in_flight: int, count: int
) -> list[float]:
    """Keeps `in_flight` requests with whoever answers until `count` are done, then cancels the rest.

    Returns:
        When each was done, seconds on the monotonic clock.
    """
    done_s: list[float] = []

    async def worker() -> None:
        while len(done_s) < count:
            await answer(next(requests))
            done_s.append(time.perf_counter())

    workers = [asyncio.create_task(worker()) for _ in range(in_flight)]
    try:
        finished, _ = await asyncio.wait(workers, return_when=asyncio.FIRST_COMPLETED)
        for task in finished:
            task.result()
    finally:
        await _cancel(workers)
    return done_s[:count]


def saturation(
    server: TritonServer, requests: Iterator[dict[str, Any]], *, in_flight: int, warm_up: int, count: int
) -> float:
    """Requests a second that the server answers when there is always one more."""
    from diffuserve_client import AsyncClient

    async def run() -> list[float]:
        async with AsyncClient(server.address.grpc, retries=0) as client:
            return await completions(
                lambda fields: client.generate(**fields), requests, in_flight=in_flight, count=warm_up + count
            )

    return throughput(asyncio.run(run()), warm_up)


@contextlib.asynccontextmanager
async def standing_load(
    client: AsyncClient, requests: Iterator[dict[str, Any]], *, in_flight: int
) -> AsyncIterator[None]:
    """Keeps `in_flight` requests with the server while the block runs; they are cancelled at its end.

    Raises:
        DiffuserveError: whatever one of them raised, at the end of the block.
    """

    async def worker() -> None:
        while True:
            await client.generate(**next(requests))

    workers = [asyncio.create_task(worker()) for _ in range(in_flight)]
    try:
        yield
        for task in workers:
            if task.done():
                task.result()
    finally:
        await _cancel(workers)


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
