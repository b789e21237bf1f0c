"""A mixture of requests under Poisson arrivals: in-flight batching against batches of whole requests and none."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffuserve.bundle.manifest import read_manifest
from diffuserve.triton.address import TritonAddress
from diffuserve.triton.configuration import read_options
from diffuserve.triton.launcher import TritonServer
from diffuserve_client import Client
from diffuserve_loadtest.bench.contenders import NONE, REQUEST, Contender, inflight_under
from diffuserve_loadtest.bench.mixture import (
    STEPS,
    Arrival,
    Kind,
    kinds_of,
    poisson_arrivals,
    shuffled_forever,
    sizes_of,
)
from diffuserve_loadtest.bench.open_loop import Answered, answer_all
from diffuserve_loadtest.bench.stage_seconds import best_mixture_per_s, mean_of, measure_stages
from diffuserve_loadtest.report import Plot, Report, Table
from diffuserve_loadtest.repositories import repository_with
from diffuserve_loadtest.summary import HEADER, Summary, summarise

_SEED = 1


@dataclass(frozen=True)
class Point:
    """One contender at one load; `slowdown`: latency over the same request's time alone."""

    contender: str
    load: float
    latency_s: Summary
    slowdown: Summary
    throughput_per_s: float
    late: int


def measure_mixed(
    bundle: Path,
    repository: Path,
    *,
    policies: Sequence[str],
    loads: Sequence[float],
    requests: int,
    saturation_requests: int,
) -> Report:
    """Every contender gets a server of its own and the same arrivals. The engines are timed before and after.

    Args:
        bundle: what the repository was assembled from.
        repository: copied for each contender.
        policies: of in-flight batching.
        loads: arrival rates, as shares of what batches of whole requests reach at saturation.
        requests: of each point.
        saturation_requests: sent all at once, and answered to the last one, to measure the saturation. In a closed loop
            some policies answer mostly short requests for a long time, which would flatter them.
    """
    model = read_manifest(bundle).model
    kinds = kinds_of(model)
    max_rows = read_options(repository)[0].max_rows
    before = {size: measure_stages(bundle, size) for size in sizes_of(model)}
    backlog = [
        Arrival(0.0, kind, number)
        for number, kind in enumerate(itertools.islice(shuffled_forever(kinds, _SEED), saturation_requests))
    ]
    saturations: dict[str, float] = {}
    points: list[Point] = []
    alone_s: Mapping[Kind, float] = {}
    for contender in (REQUEST, NONE, *inflight_under(policies)):  # the first is what the loads are measured by
        with _served(repository, contender) as server:
            _warm_up(server, kinds)
            alone_s = alone_s or _alone_s(server, kinds)
            saturations[contender.name] = answer_all(server, backlog).throughput_per_s
            for load in loads:
                arrivals = poisson_arrivals(kinds, load * saturations[REQUEST.name], requests, _SEED)
                answered = answer_all(server, arrivals)
                slowdowns = [
                    latency_s / alone_s[arrival.kind]
                    for latency_s, arrival in zip(answered.latency_s, arrivals, strict=True)
                ]
                points.append(_point(contender, load, answered, slowdowns))
    seconds = {size: mean_of([stages, measure_stages(bundle, size)]) for size, stages in before.items()}
    best_per_s = best_mixture_per_s(kinds, seconds, max_rows)
    return Report(
        "mixed",
        {
            "bundle": str(bundle),
            "loads": list(loads),
            "requests": requests,
            "saturation_requests": saturation_requests,
            "max_rows": max_rows,
            "kinds": [asdict(kind) for kind in kinds],
        },
        {
            "engines_allow_per_s": best_per_s,
            "engines": {f"{width} x {height}": stages.to_json() for (width, height), stages in seconds.items()},
            "saturation_per_s": saturations,
            "alone_s": [{**asdict(kind), "seconds": seconds} for kind, seconds in alone_s.items()],
            "points": [asdict(point) for point in points],
        },
        [_saturation_table(saturations, best_per_s), _points_table(points)],
        [f"Sent late by more than 50 ms: {sum(point.late for point in points)} requests."],
        {"slowdown": _plot(points)},
    )


@contextmanager
def _served(repository: Path, contender: Contender) -> Iterator[TritonServer]:
    """A warm server with the contender's settings."""
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=repository.resolve().parent) as folder:
        copy = repository_with(repository, Path(folder) / "repository", contender.parameters)
        with TritonServer(copy, TritonAddress.on_free_ports()) as server:
            yield server


def _warm_up(server: TritonServer, kinds: Sequence[Kind]) -> None:
    """A request of each size, guided and not."""
    with Client(server.address.grpc) as client:
        for number, kind in enumerate(kinds):
            if kind.steps == min(STEPS):
                client.generate(**kind.fields(10**6 + number))


def _alone_s(server: TritonServer, kinds: Sequence[Kind]) -> dict[Kind, float]:
    """Seconds of each kind on an idle server, the fastest of two."""
    seconds = {}
    with Client(server.address.grpc) as client:
        for number, kind in enumerate(kinds):
            times_s = []
            for again in range(2):
                started_s = time.perf_counter()
                client.generate(**kind.fields(2 * 10**6 + 2 * number + again))
                times_s.append(time.perf_counter() - started_s)
            seconds[kind] = min(times_s)
    return seconds


def _point(contender: Contender, load: float, answered: Answered, slowdowns: Sequence[float]) -> Point:
    latency_s = summarise(answered.latency_s)
    return Point(contender.name, load, latency_s, summarise(slowdowns), answered.throughput_per_s, answered.late)


def _saturation_table(saturations: Mapping[str, float], best_per_s: float) -> Table:
    rows = [(name, f"{rate:.3f}", f"{rate / best_per_s:.2f}") for name, rate in saturations.items()]
    rows.append(("the engines' own batching allows", f"{best_per_s:.3f}", "1.00"))
    return Table(
        "At saturation: all requests sent at once", ("batching", "requests/s", "of what the engines allow"), rows
    )


def _points_table(points: Sequence[Point]) -> Table:
    header: tuple[Any, ...] = ("load", "batching", "requests/s", *(f"latency {name} s" for name in HEADER))
    rows = [
        (
            f"{point.load:.2f}",
            point.contender,
            f"{point.throughput_per_s:.3f}",
            *point.latency_s.cells(),
            *point.slowdown.cells(),
        )
        for point in sorted(points, key=lambda point: point.load)
    ]
    title = "Load is the share of what batches of whole requests reach at saturation"
    return Table(title, (*header, *(f"slowdown {name}" for name in HEADER)), rows)


def _plot(points: Sequence[Point]) -> Plot:
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        lines.setdefault(point.contender, []).append((point.load, point.slowdown.p95))
    return Plot(lines, "load, share of the saturation of whole-request batching", "p95 slowdown", log_y=True)
