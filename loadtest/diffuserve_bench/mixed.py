"""A mixture of requests under Poisson arrivals: in-flight batching against batches of whole requests and none."""

from __future__ import annotations

import math
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
from diffuserve_bench.contenders import NONE, REQUEST, Contender, inflight_under
from diffuserve_bench.mixture import STEPS, backlog, kinds_of, one_of_each, poisson, sizes_of
from diffuserve_client import Client
from diffuserve_loadtest.engine_bound import bound_per_s
from diffuserve_loadtest.report.report import Plot, Report, Table
from diffuserve_loadtest.report.summary import HEADER, Summary, summarise
from diffuserve_loadtest.sending.generator import generate
from diffuserve_loadtest.sending.records import Record, all_answered
from diffuserve_loadtest.sending.target import Target
from diffuserve_loadtest.server.repositories import repository_with
from diffuserve_loadtest.stage_seconds import mean_of, measure_stages
from diffuserve_loadtest.workload.plan import PlannedRequest
from diffuserve_loadtest.workload.workload import Workload

_SEED = 1
# Far from those of the loads, so that no text is known yet.
_WARM_UP_BLOCK, _ALONE_BLOCKS = 10**6, (10**6 + 1, 10**6 + 2)


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
    all_at_once = backlog(kinds, saturation_requests, _SEED)
    saturations: dict[str, float] = {}
    points: list[Point] = []
    alone_s: Mapping[str, float] = {}
    for contender in (REQUEST, NONE, *inflight_under(policies)):  # the first is what the loads are measured by
        with _served(repository, contender) as server:
            _warm_up(server, all_at_once)
            alone_s = alone_s or _alone_s(server, all_at_once)
            saturations[contender.name] = _throughput_per_s(_answers(server, all_at_once))
            for load in loads:
                workload = poisson(kinds, load * saturations[REQUEST.name], requests, _SEED)
                points.append(_point(contender, load, _answers(server, workload), alone_s))
    seconds = {size: mean_of([stages, measure_stages(bundle, size)]) for size, stages in before.items()}
    best_per_s = bound_per_s(all_at_once, model, seconds, max_rows)
    return Report(
        "mixed",
        {
            "bundle": str(bundle),
            "loads": list(loads),
            "requests": requests,
            "saturation_requests": saturation_requests,
            "max_rows": max_rows,
            "kinds": [_to_json(request) for request in one_of_each(all_at_once)],
        },
        {
            "engines_allow_per_s": best_per_s,
            "engines": {f"{width} x {height}": stages.to_json() for (width, height), stages in seconds.items()},
            "saturation_per_s": saturations,
            "alone_s": [
                {**_to_json(request), "seconds": alone_s[request.kind]} for request in one_of_each(all_at_once)
            ],
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


def _warm_up(server: TritonServer, workload: Workload) -> None:
    """A request of each size, guided and not."""
    with Client(server.address.grpc) as client:
        for request in one_of_each(workload, block=_WARM_UP_BLOCK):
            if request.fields["steps"] == min(STEPS):
                client.generate(**request.fields)


def _alone_s(server: TritonServer, workload: Workload) -> dict[str, float]:
    """Seconds of each kind on an idle server, the fastest of two."""
    seconds: dict[str, float] = {}
    with Client(server.address.grpc) as client:
        for block in _ALONE_BLOCKS:
            for request in one_of_each(workload, block):
                started_s = time.perf_counter()
                client.generate(**request.fields)
                seconds[request.kind] = min(seconds.get(request.kind, math.inf), time.perf_counter() - started_s)
    return seconds


def _answers(server: TritonServer, workload: Workload) -> Sequence[Record]:
    return all_answered(generate(workload, Target("triton-grpc", server.address.grpc))[0])


def _throughput_per_s(answers: Sequence[Record]) -> float:
    """To the last answer."""
    return len(answers) / max(record.done_s for record in answers)


def _point(contender: Contender, load: float, answers: Sequence[Record], alone_s: Mapping[str, float]) -> Point:
    latency_s = summarise([record.latency_s for record in answers])
    slowdown = summarise([record.latency_s / alone_s[record.kind] for record in answers])
    late = sum(record.late for record in answers)
    return Point(contender.name, load, latency_s, slowdown, _throughput_per_s(answers), late)


def _to_json(request: PlannedRequest) -> dict[str, Any]:
    """Its kind."""
    width, height = request.size
    return {"steps": request.fields["steps"], "guided": request.rows > 1, "width": width, "height": height}


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
