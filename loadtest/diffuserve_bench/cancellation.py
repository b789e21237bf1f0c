"""How soon the rows of a cancelled request are free, under load, and whether anything of it stays behind."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec

from diffuserve.bundle.manifest import ModelSpec
from diffuserve.triton.launcher import TritonServer
from diffuserve_bench.mixture import closed, kind_of, sizes_of
from diffuserve_bench.standing_load import standing_load
from diffuserve_client import AsyncClient, Progress
from diffuserve_loadtest.server.metrics import read_metrics
from diffuserve_loadtest.workload.plan import plan

_IMAGES = 4
_STEPS = 20
_STANDING_STEPS = 100
_POLL_S = 0.02
_GIVE_UP_S = 30.0


@dataclass(frozen=True)
class Freed:
    """One cancelled request.

    `steps`: UNet calls that were counted between the cancellation and the first look at the metrics that showed its rows
    gone. The counts reach the metrics at intervals, so the call that ended just before may be among them. `seconds`: the
    same in time, the metrics' interval included.
    """

    after_step: int
    steps: int
    seconds: float


@dataclass(frozen=True)
class Cancellations:
    """`leaked_requests`, `leaked_rows`: what the server still counts when everything has been cancelled."""

    freed: list[Freed]
    leaked_requests: int
    leaked_rows: int


def cancel_under_load(server: TritonServer, model: ModelSpec, *, cancels: int, in_flight: int) -> Cancellations:
    """Cancels requests one after another, each after a random number of steps, while others keep the server full."""
    return asyncio.run(_cancel_under_load(server, model, cancels, in_flight))


async def _cancel_under_load(server: TritonServer, model: ModelSpec, cancels: int, in_flight: int) -> Cancellations:
    choose = random.Random(0)  # noqa: S311 - a load, no secret
    size = sizes_of(model)[1]  # the smaller one: what is shown does not depend on the size
    standing = closed([kind_of(_STANDING_STEPS, size)], in_flight)
    victims = closed([msgspec.structs.replace(kind_of(_STEPS, size), num_images=_IMAGES)], 1, seed=2)
    standing_rows = plan(standing, 0).rows * in_flight
    freed = []
    with standing_load(server, standing):
        async with AsyncClient(server.address.grpc) as client:
            for number in range(cancels):
                fields, after_step = plan(victims, number).fields, choose.randint(1, _STEPS // 2)
                freed.append(await _cancel_one(server, client, fields, after_step, standing_rows))
    return Cancellations(freed, *await _leaked(server))


async def _cancel_one(
    server: TritonServer, client: AsyncClient, fields: dict[str, Any], after_step: int, standing_rows: int
) -> Freed:
    async with aclosing(client.stream(**fields)) as events:
        async for event in events:
            if isinstance(event, Progress) and event.step == after_step:
                break
        before = await _read(server)
    cancelled_s = time.perf_counter()
    while True:
        now = await _read(server)
        # The standing requests' rows come and go too, so it takes the counter to say that it was this request.
        if now["requests_cancelled"] > before["requests_cancelled"] and _rows(now) <= standing_rows:
            steps = int(now["unet_calls"] - before["unet_calls"])
            return Freed(after_step, steps, time.perf_counter() - cancelled_s)
        if time.perf_counter() - cancelled_s > _GIVE_UP_S:
            raise RuntimeError(f"A cancelled request still had its rows after {_GIVE_UP_S:g} s.")
        await asyncio.sleep(_POLL_S)


async def _leaked(server: TritonServer) -> tuple[int, int]:
    """Requests and rows that the server still counts, once nothing changes any more or it counts none."""
    end_s = time.perf_counter() + _GIVE_UP_S
    while True:
        metrics = await _read(server)
        requests = metrics["requests_waiting"] + metrics["requests_running"]
        if (not requests and not _rows(metrics)) or time.perf_counter() > end_s:
            return int(requests), int(_rows(metrics))
        await asyncio.sleep(_POLL_S)


def _rows(metrics: dict[str, float]) -> float:
    return metrics["rows_waiting"] + metrics["rows_running"]


async def _read(server: TritonServer) -> dict[str, float]:
    return await asyncio.to_thread(read_metrics, server.address.metrics)
