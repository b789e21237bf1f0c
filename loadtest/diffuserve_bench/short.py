"""Short requests amid long ones: what one waits, against the steps it needs at the full row budget."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from pathlib import Path

from diffuserve.batching.costs import CallCosts
from diffuserve.bundle.manifest import read_manifest
from diffuserve.triton.address import TritonAddress
from diffuserve.triton.configuration import read_options
from diffuserve.triton.launcher import TritonServer
from diffuserve_bench.mixture import closed, kind_of
from diffuserve_bench.standing_load import standing_load
from diffuserve_client import Client
from diffuserve_loadtest.report.report import Plot, Report, Table
from diffuserve_loadtest.report.summary import HEADER, summarise
from diffuserve_loadtest.stage_seconds import StageSeconds, mean_of, measure_stages
from diffuserve_loadtest.workload.plan import plan
from diffuserve_loadtest.workload.workload import Workload

# So that no text of a short request is known from a long one's.
_OTHER_TEXTS = 10**6


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
    size = (model.width, model.height)
    before = measure_stages(bundle)
    # Long ones begin over the time that one takes, so that they end at any moment and not all at the same.
    calls_a_step = math.ceil(2 * in_flight / max_rows)
    long_s = long_steps * calls_a_step * CallCosts(before.unet).seconds(max_rows)
    short, long = closed([kind_of(steps, size)], 1), closed([kind_of(long_steps, size)], in_flight, ramp_s=long_s)
    with TritonServer(repository, TritonAddress.on_free_ports()) as server:
        latencies_s = _latencies_s(server, short, long, requests)
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


def _latencies_s(server: TritonServer, short: Workload, long: Workload, requests: int) -> list[float]:
    choose = random.Random(0)  # noqa: S311 - a load, no secret
    latencies_s = []
    with standing_load(server, long), Client(server.address.grpc) as client:
        for number in range(requests):
            time.sleep(choose.uniform(0, 1))
            fields = plan(short, _OTHER_TEXTS + number).fields
            started_s = time.perf_counter()
            client.generate(**fields)
            latencies_s.append(time.perf_counter() - started_s)
    return latencies_s
