"""The comparison: every contender alone on the machine, with the same requests at the same times.

First each is given a backlog to answer as fast as it can, which is its saturation; then Poisson arrivals at shares of the
slowest one's saturation, in the reverse order, and the backlog again, so that a machine that grows slower or faster does not
favour those that come first.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import click
import msgspec

from diffuserve_loadtest.generator import generate
from diffuserve_loadtest.measures import measure
from diffuserve_loadtest.peers.contenders import Contender
from diffuserve_loadtest.records import OK
from diffuserve_loadtest.report import Report, Table
from diffuserve_loadtest.servers import UnderTest
from diffuserve_loadtest.slo import Slo
from diffuserve_loadtest.watch import Watch
from diffuserve_loadtest.workload import Bursts, Closed, Poisson, Requests, Workload

LOADS = (0.5, 0.8)
_WARM_UP_REQUESTS = 16
_PATIENCE_S = 400.0


@dataclass
class Figures:
    """One contender's, as they come in; latencies in seconds by load."""

    saturations_per_s: list[float] = field(default_factory=list)
    latency_s: dict[float, dict[str, float]] = field(default_factory=dict)
    errors: int = 0
    peak_bytes: int = 0

    @property
    def saturation_per_s(self) -> float:
        return statistics.fmean(self.saturations_per_s)


def compare_peers(
    contenders: Sequence[Contender], requests: Requests, *, backlog: int, seconds: float, settings: dict[str, object]
) -> Report:
    """Args:
    contenders: two or more.
    requests: what is asked for.
    backlog: requests that are sent at once to measure the saturation.
    seconds: of each load.
    settings: for the report.
    """
    figures = {contender.name: Figures() for contender in contenders}
    for contender in contenders:
        with contender.start() as server, Watch(None, server.pid) as watch:
            _warm_up(server, requests)
            _saturate(server, requests, backlog, figures[contender.name], contender.name)
        _keep_peak(figures[contender.name], watch)
    slowest_per_s = min(each.saturation_per_s for each in figures.values())
    for contender in reversed(contenders):
        mine = figures[contender.name]
        with contender.start() as server, Watch(None, server.pid) as watch:
            _warm_up(server, requests)
            for load in LOADS:
                workload = _workload(requests, Poisson(rate_per_s=load * slowest_per_s), seconds)
                recording, kept_up = generate(workload, server.target, key_file=server.key_file)
                measures = measure(recording, [], Slo())
                mine.latency_s[load] = dict(measures.latency_s)
                mine.errors += sum(record.outcome != OK for record in recording.records)
                click.echo(
                    f"{contender.name}: p95 {measures.latency_s['p95']:.2f} s at {load:.0%}"
                    + ("" if kept_up else " (the generator could not keep up)"),
                    err=True,
                )
            _saturate(server, requests, backlog, mine, contender.name)
        _keep_peak(mine, watch)
    return _report(contenders, figures, slowest_per_s, settings)


def _workload(requests: Requests, arrivals: Poisson | Bursts | Closed, duration_s: float) -> Workload:
    return Workload(
        "A comparison of servers.",
        arrivals,
        (requests,),
        duration_s=duration_s,
        warm_up_s=0.0,
        patience_s=_PATIENCE_S,
    )


def _warm_up(server: UnderTest, requests: Requests) -> None:
    burst = Bursts(rate_per_s=_WARM_UP_REQUESTS, size=_WARM_UP_REQUESTS)
    recording, _ = generate(_workload(requests, burst, 1.0), server.target, key_file=server.key_file)
    for record in recording.records:
        if record.outcome != OK:
            raise click.ClickException(f"{server.target.url} does not answer: {record.outcome}: {record.message}")


def _saturate(server: UnderTest, requests: Requests, backlog: int, figures: Figures, name: str) -> None:
    """A backlog, from the moment at which it is sent to the last answer."""
    burst = Bursts(rate_per_s=backlog, size=backlog)
    recording, _ = generate(_workload(requests, burst, 1.0), server.target, key_file=server.key_file)
    answered = [record for record in recording.records if record.outcome == OK]
    figures.errors += len(recording.records) - len(answered)
    images = sum(record.images for record in answered)
    figures.saturations_per_s.append(images / max(record.done_s for record in recording.records))
    click.echo(f"{name}: {figures.saturations_per_s[-1]:.3f} images/s", err=True)


def _keep_peak(figures: Figures, watch: Watch) -> None:
    figures.peak_bytes = max(figures.peak_bytes, *(sample.proportional_bytes for sample in watch.samples))


def _report(
    contenders: Sequence[Contender], figures: dict[str, Figures], slowest_per_s: float, settings: dict[str, object]
) -> Report:
    header = ("server", "images/s at saturation", *(f"{p} s at {load:.0%}" for load in LOADS for p in ("p50", "p95")))
    rows = []
    for contender in contenders:
        mine = figures[contender.name]
        rows.append(
            (
                contender.name,
                f"{mine.saturation_per_s:.3f} ({', '.join(f'{rate:.3f}' for rate in mine.saturations_per_s)})",
                *(f"{mine.latency_s[load][p]:.2f}" for load in LOADS for p in ("p50", "p95")),
                f"{mine.peak_bytes / 2**20:.0f}",
                str(contender.setup_lines),
                str(mine.errors),
            )
        )
    rows.sort(key=lambda row: row[1])
    return Report(
        "peers",
        settings,
        {
            "slowest_saturation_per_s": slowest_per_s,
            "contenders": {
                name: {
                    "saturations_per_s": each.saturations_per_s,
                    "latency_s": {str(load): latency_s for load, latency_s in each.latency_s.items()},
                    "errors": each.errors,
                    "peak_bytes": each.peak_bytes,
                }
                for name, each in figures.items()
            },
        },
        [
            Table(
                f"Loads are shares of the slowest one's saturation, {slowest_per_s:.3f} images/s",
                (*header, "peak memory, MiB", "lines of setup", "errors"),
                rows,
            )
        ],
    )


def uniform(steps: int) -> Requests:
    """Guided requests of the native size that differ in prompt and seed only."""
    return msgspec.structs.replace(Requests(), steps=steps, sampler="dpmpp_2m")
