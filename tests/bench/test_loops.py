"""Open and closed loops, before whatever answers."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from diffuserve_bench.closed_loop import completions
from diffuserve_bench.mixture import Arrival, Kind
from diffuserve_bench.open_loop import Answered, answered
from diffuserve_bench.virtual_time import run_in_virtual_time

_KIND = Kind(10, True, 64, 64)


def test_an_open_loop_counts_from_when_requests_are_due() -> None:
    busy = asyncio.Lock()

    async def one_at_a_time(arrival: Arrival) -> None:
        async with busy:
            await asyncio.sleep(2 + arrival.seed)

    async def run() -> Answered:
        arrivals = [Arrival(5.0, _KIND, 0), Arrival(6.0, _KIND, 1), Arrival(30.0, _KIND, 2)]
        return await answered(arrivals, one_at_a_time, asyncio.get_running_loop().time)

    outcome = run_in_virtual_time(run())
    assert outcome.latency_s == pytest.approx([2, 4, 4])
    assert outcome.duration_s == pytest.approx(34)
    assert outcome.throughput_per_s == pytest.approx(3 / 34)
    assert outcome.late == 0


def test_one_failure_ends_an_open_loop() -> None:
    given_up = []

    async def failing(arrival: Arrival) -> None:
        try:
            await asyncio.sleep(10 * arrival.seed)
        except asyncio.CancelledError:
            given_up.append(arrival.seed)
            raise
        raise ValueError("no")

    async def run() -> None:
        arrivals = [Arrival(0.0, _KIND, seed) for seed in (1, 2, 3)]
        with pytest.raises(ValueError, match="no"):
            await answered(arrivals, failing, asyncio.get_running_loop().time)
        await asyncio.sleep(1)

    run_in_virtual_time(run())
    assert given_up == [2, 3]


def test_a_closed_loop_always_has_one_more() -> None:
    active: set[int] = set()
    seen: list[frozenset[int]] = []
    cancelled = []

    async def answer(request: int) -> None:
        active.add(request)
        seen.append(frozenset(active))
        try:
            await asyncio.sleep(1 + request % 3)
        except asyncio.CancelledError:
            cancelled.append(request)
            raise
        finally:
            active.discard(request)

    done_s = run_in_virtual_time(completions(answer, itertools.count(), in_flight=3, count=7))
    assert len(done_s) == 7
    assert all(len(together) <= 3 for together in seen)
    assert [len(together) for together in seen[2:]] == [3] * (len(seen) - 2)
    assert len(seen) - len(cancelled) >= 7
    assert not active
