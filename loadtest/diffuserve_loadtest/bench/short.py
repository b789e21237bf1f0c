"""Short requests amid long ones: what one waits, against the steps it needs at the full row budget."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diffuserve.batching.costs import CallCosts
from diffuserve.bundle.manifest import read_manifest
from diffuserve.triton.address import TritonAddress
from diffuserve.triton.configuration import read_options
from diffuserve.triton.launcher import TritonServer
from diffuserve_client import AsyncClient
from diffuserve_loadtest.bench.closed_loop import standing_load
from diffuserve_loadtest.bench.mixture import Kind
from diffuserve_loadtest.bench.stage_seconds import StageSeconds, mean_of, measure_stages
from diffuserve_loadtest.report import Plot, Report, Table
from diffuserve_loadtest.summary import HEADER, summarise

_FILL_S = 5.0


def measure_short(
    bundle: Path, repository: Path, *, requests: int, steps: int, long_steps: int, in_flight: int | None
) -> Report:
    """Short guided requests come one after another, at random moments, to a server that long ones keep full.

    Args:
        bundle: what the repository was assembled from.
        repository: served as it is.
        requests: short ones.
        steps: of a short one.
        long_steps: of a long one.
        in_flight: long requests; by default as many as the row budget has rows, which is two calls' worth.
    """
    model = read_manifest(bundle).model
    max_rows = read_options(repository)[0].max_rows
    in_flight = in_flight or max_rows
    short, long = (Kind(count, True, model.width, model.height) for count in (steps, long_steps))
    before = measure_stages(bundle)
    with TritonServer(repository, TritonAddress.on_free_ports()) as server:
        latencies_s = asyncio.run(_latencies_s(server, short, long, requests, in_flight))
    seconds = mean_of([before, measure_stages(bundle)])
    needed_s = needed(seconds, steps, max_rows)
    latency_s = summarise(latencies_s)
    return Report(
        "short",
        {
            "bundle": str(bundle),
            "requests": requests,
            "steps": steps,
            "long_steps": long_steps,
            "in_flight": in_flight,
            "max_rows": max_rows,
        },
        {
            "latencies_s": latencies_s,
            "needed_s": needed_s,
            "ratio_p95": latency_s.p95 / needed_s,
            "engines": seconds.to_json(),
        },
        [
            Table(
                f"Latency in seconds of {steps} steps amid {in_flight} requests of {long_steps}",
                HEADER,
                [latency_s.cells()],
            )
        ],
        [
            f"{steps} UNet calls at {max_rows} rows, a text and an image: {needed_s:.2f} s",
            f"p95 / that: {latency_s.p95 / needed_s:.2f}",
        ],
        {"latency": _plot(latencies_s, needed_s)},
    )


def _plot(latencies_s: Sequence[float], needed_s: float) -> Plot:
    shares = [(latency_s, rank / len(latencies_s)) for rank, latency_s in enumerate(sorted(latencies_s), 1)]
    needed = "its UNet calls at the full row budget, text and image"
    return Plot({"short requests": shares, needed: [(needed_s, 0), (needed_s, 1)]}, "seconds", "share done")


def needed(seconds: StageSeconds, steps: int, max_rows: int) -> float:
    """Seconds of a request that is in every call of a full server, and alone in the other stages."""
    return steps * CallCosts(seconds.unet).seconds(max_rows) + seconds.text_encoder[1] + seconds.vae_decoder[1]


async def _latencies_s(server: TritonServer, short: Kind, long: Kind, requests: int, in_flight: int) -> list[float]:
    choose = random.Random(0)  # noqa: S311 - a load, no secret
    # The first of them have fewer steps, so that long ones end at any moment and not all at the same.
    steps = itertools.chain((choose.randint(1, long.steps) for _ in range(in_flight)), itertools.repeat(long.steps))
    long_requests = (replace(long, steps=count).fields(10**6 + number) for number, count in enumerate(steps))
    latencies_s = []
    async with AsyncClient(server.address.grpc) as client:
        await client.generate(**short.fields(10**5))
        async with standing_load(client, long_requests, in_flight=in_flight):
            await asyncio.sleep(_FILL_S)
            for number in range(requests):
                await asyncio.sleep(choose.uniform(0, 1))
                started_s = time.perf_counter()
                await client.generate(**short.fields(number))
                latencies_s.append(time.perf_counter() - started_s)
    return latencies_s
