"""Which order is best when not everything fits: the real loop and the real policies on a UNet that only takes time.

Time is virtual, and a call takes what was measured for its number of rows, so hours of load pass in seconds.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Awaitable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffuserve.batching.costs import CallCosts
from diffuserve.batching.loop import InflightLoop
from diffuserve.bundle.manifest import Manifest, read_manifest
from diffuserve.errors import BundleError
from diffuserve.limits import Limits
from diffuserve.samplers import NoiseSchedule
from diffuserve.stages import Conditioning, Float32
from diffuserve_bench.contenders import NONE, REQUEST, Contender, inflight_under
from diffuserve_bench.in_process import Answered, job_of, open_loop
from diffuserve_bench.mixture import backlog, kinds_of, one_of_each, poisson
from diffuserve_bench.virtual_time import run_in_virtual_time
from diffuserve_loadtest.report.report import Plot, Report, Table
from diffuserve_loadtest.report.summary import HEADER, Summary, summarise
from diffuserve_loadtest.workload.plan import PlannedRequest
from diffuserve_loadtest.workload.workload import Workload

_TEXT = {"encoder_hidden_states": np.zeros((1, 1), np.float32)}


@dataclass(frozen=True)
class Outcome:
    """One contender under one load: seconds, and latency over the same request's time alone."""

    contender: str
    utilisation: float
    latency_s: Summary
    slowdown: Summary


class Simulation:
    """A model without engines: its scheduler, and the measured cost of its UNet.

    What a size costs is the native size's, by its share of the pixels.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.max_rows = Limits.for_model(manifest.model).max_rows
        self.max_active_images = Limits.for_model(manifest.model).max_active_images
        if not manifest.unet_seconds:
            raise BundleError(
                "What a UNet call costs has not been measured. Do it first: diffuserve bench engine --save"
            )
        self.costs = CallCosts(manifest.unet_seconds)
        self.kinds = kinds_of(manifest.model)
        self.one_of_each = one_of_each(backlog(self.kinds, len(self.kinds), seed=0))
        self._schedule = NoiseSchedule.from_config(manifest.scheduler)
        self._native_px = manifest.model.width * manifest.model.height
        self._sizes = sorted({self.size(request) for request in self.one_of_each})

    def area(self, size: tuple[int, int]) -> float:
        return size[0] * size[1] / self._native_px

    def size(self, request: PlannedRequest) -> tuple[int, int]:
        return request.fields["width"], request.fields["height"]

    def alone_s(self, request: PlannedRequest) -> float:
        steps: int = request.fields["steps"]
        return steps * self.costs.seconds(request.rows) * self.area(self.size(request))

    @property
    def capacity_per_s(self) -> float:
        """Requests of the mixture a second, if every row ran in the cheapest batch."""
        row_s = min(self.costs.seconds(rows) / rows for rows in range(1, self.max_rows + 1))
        return 1 / statistics.mean(
            request.unet_rows * row_s * self.area(self.size(request)) for request in self.one_of_each
        )

    def run(self, contender: Contender, workload: Workload) -> Answered:
        """What each request waits from its arrival to its last step, in virtual time."""
        return run_in_virtual_time(self._run(contender, workload))

    async def _run(self, contender: Contender, workload: Workload) -> Answered:
        now_s = asyncio.get_running_loop().time
        selection = contender.selection(self.max_rows, self.costs)
        loop = InflightLoop(self._denoise, selection, max_active_images=self.max_active_images, clock=now_s)

        def answer(request: PlannedRequest) -> Awaitable[object]:
            # A size is told by the width of a latent of one row.
            shape = (1, 1, self._sizes.index(self.size(request)) + 1)
            return loop.denoise(job_of(request, self._schedule, shape, _TEXT, now_s()))

        return await open_loop(workload, answer, now_s)

    async def _denoise(self, sample: Float32, timestep: Float32, conditioning: Conditioning) -> Float32:
        size = self._sizes[sample.shape[-1] - 1]
        await asyncio.sleep(self.costs.seconds(len(sample)) * self.area(size))
        return np.zeros_like(sample)


def measure_policies(
    bundle: Path, *, policies: Sequence[str], utilisations: Sequence[float], requests: int, seeds: int
) -> Report:
    """Runs every contender through the same arrivals at every load."""
    simulation = Simulation(read_manifest(bundle))
    contenders = [NONE, REQUEST, *inflight_under(policies)]
    outcomes = [
        _outcome(simulation, contender, utilisation, requests, seeds)
        for utilisation in utilisations
        for contender in contenders
    ]
    return Report(
        "policies",
        {"bundle": str(bundle), "utilisations": list(utilisations), "requests": requests, "seeds": seeds},
        {"capacity_per_s": simulation.capacity_per_s, "outcomes": [asdict(outcome) for outcome in outcomes]},
        [_table(outcomes)],
        [f"Capacity: {simulation.capacity_per_s:.2f} requests/s.", *_verdicts(outcomes)],
        {"slowdown": _plot(outcomes)},
    )


def _outcome(simulation: Simulation, contender: Contender, utilisation: float, requests: int, seeds: int) -> Outcome:
    latencies_s: list[float] = []
    slowdowns: list[float] = []
    for seed in range(seeds):
        workload = poisson(simulation.kinds, utilisation * simulation.capacity_per_s, requests, seed)
        answered = simulation.run(contender, workload)
        latencies_s += answered.latency_s
        slowdowns += [
            latency_s / simulation.alone_s(request)
            for request, latency_s in zip(answered.requests, answered.latency_s, strict=True)
        ]
    return Outcome(contender.name, utilisation, summarise(latencies_s), summarise(slowdowns))


def _table(outcomes: Sequence[Outcome]) -> Table:
    header = ("load", "batching", *(f"latency {name} s" for name in HEADER), *(f"slowdown {name}" for name in HEADER))
    rows = [
        (f"{outcome.utilisation:.2f}", outcome.contender, *outcome.latency_s.cells(), *outcome.slowdown.cells())
        for outcome in outcomes
    ]
    return Table("Virtual time; load is the share of the capacity", header, rows)


def _verdicts(outcomes: Sequence[Outcome]) -> list[str]:
    """The best over all loads, by the geometric mean, so that no single load decides."""

    def best(figure: str, values: dict[str, list[float]]) -> str:
        means = {name: statistics.geometric_mean(sample) for name, sample in values.items()}
        ranked = sorted(means, key=lambda name: means[name])
        return f"Best by {figure}: " + ", ".join(f"{name} ({means[name]:.2f})" for name in ranked)

    means: dict[str, list[float]] = {}
    tails: dict[str, list[float]] = {}
    for outcome in outcomes:
        means.setdefault(outcome.contender, []).append(outcome.latency_s.mean)
        tails.setdefault(outcome.contender, []).append(outcome.slowdown.p95)
    return [best("mean latency, s", means), best("p95 slowdown", tails)]


def _plot(outcomes: Sequence[Outcome]) -> Plot:
    lines: dict[str, Any] = {}
    for outcome in outcomes:
        lines.setdefault(outcome.contender, []).append((outcome.utilisation, outcome.slowdown.mean))
    return Plot(lines, "load, share of the capacity", "mean slowdown", log_y=True)
