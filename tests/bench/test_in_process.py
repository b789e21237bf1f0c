"""Open and closed loops, before whatever answers."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest

from diffuserve_bench.in_process import Answered, closed_loop, open_loop
from diffuserve_bench.mixture import backlog, kind_of
from diffuserve_bench.virtual_time import run_in_virtual_time
from diffuserve_loadtest.workload.arrivals import Replay
from diffuserve_loadtest.workload.plan import PlannedRequest, plan
from diffuserve_loadtest.workload.workload import Requests, Workload


def test_an_open_loop_counts_from_when_requests_are_due(tmp_path: Path) -> None:
    (tmp_path / "times.csv").write_text("5\n6\n30\n")
    workload = Workload("A test.", Replay(str(tmp_path / "times.csv")), (Requests(),))
    busy = asyncio.Lock()

    async def one_at_a_time(request: PlannedRequest) -> None:
        async with busy:
            await asyncio.sleep(2 + request.number)

    async def run() -> Answered:
        return await open_loop(workload, one_at_a_time, asyncio.get_running_loop().time)

    outcome = run_in_virtual_time(run())
    assert outcome.latency_s == pytest.approx([2, 4, 4])
    assert outcome.requests == [plan(workload, number) for number in range(3)]
    assert outcome.duration_s == pytest.approx(34)
    assert outcome.throughput_per_s == pytest.approx(3 / 34)
    assert outcome.late == 0


def test_one_failure_ends_an_open_loop() -> None:
    given_up = []

    async def failing(request: PlannedRequest) -> None:
        try:
            await asyncio.sleep(10 + 10 * request.number)
        except asyncio.CancelledError:
            given_up.append(request.number)
            raise
        raise ValueError("no")

    async def run() -> None:
        with pytest.raises(ValueError, match="no"):
            await open_loop(backlog([kind_of(10, (64, 64))], 3, 0), failing, asyncio.get_running_loop().time)
        await asyncio.sleep(1)

    run_in_virtual_time(run())
    assert given_up == [1, 2]


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

    done_s = run_in_virtual_time(closed_loop(itertools.count(), answer, in_flight=3, count=7))
    assert len(done_s) == 7
    assert all(len(together) <= 3 for together in seen)
    assert [len(together) for together in seen[2:]] == [3] * (len(seen) - 2)
    assert len(seen) - len(cancelled) >= 7
    assert not active
