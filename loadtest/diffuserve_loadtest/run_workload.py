"""Runs a workload against a server: sends it, watches the server, measures."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence

import click
import msgspec

from diffuserve_loadtest.report.machine import describe_machine
from diffuserve_loadtest.report.measures import measure, values_for
from diffuserve_loadtest.report.run import FORMAT_VERSION, Run
from diffuserve_loadtest.report.slo import Slo
from diffuserve_loadtest.sending.generator import generate
from diffuserve_loadtest.sending.records import Recording
from diffuserve_loadtest.server.under_test import UnderTest
from diffuserve_loadtest.server.watch import Sample, Watch
from diffuserve_loadtest.workload.arrivals import Closed
from diffuserve_loadtest.workload.plan import plan
from diffuserve_loadtest.workload.workload import Workload

_CAPACITY_S, _CAPACITY_WARM_UP_S = 30.0, 10.0
_USERS = 32  # where the server does not say how many rows per call may have
_SETTLE_S = 1.0
_PLANNED = 1000


def run_workload(
    name: str,
    workload: Workload,
    server: UnderTest,
    *,
    slo: Slo = Slo(),  # noqa: B008 - it cannot be changed
    capacity_per_s: float | None = None,
    engine_bound_per_s: float | None = None,
    workers: int = 1,
) -> Run:
    """Raises `GeneratorFailed` and `NothingMeasured`."""
    workload = workload if capacity_per_s is None else workload.at_capacity(capacity_per_s)
    with Watch(server.metrics_url, server.pid, server.target.model) as watch:
        recording, kept_up = generate(workload, server.target, key_file=server.key_file, workers=workers)
        time.sleep(_SETTLE_S)  # metrics are brought up to date at intervals
    measures = measure(recording, watch.samples, slo)
    return Run(
        FORMAT_VERSION,
        name,
        describe_machine(),
        f"{server.target.protocol} {server.target.url}",
        kept_up,
        capacity_per_s,
        recording,
        watch.samples,
        measures,
        slo,
        slo.judge(values_for(slo, measures, recording)),
        engine_bound_per_s,
    )


def measure_capacity(workload: Workload, server: UnderTest, *, duration_s: float = _CAPACITY_S) -> float:
    """Requests of a workload's mixture that the server answers in a second when there is always one more.

    As many users as a UNet call has rows, each of whom sends a request when the last one has been answered. Where the server
    has metrics, its UNet rows per second are divided by those of a mean request, since requests that are answered in bunches
    say little about half a minute; elsewhere answers are counted.
    """
    users = server.max_rows or _USERS
    closed = msgspec.structs.replace(
        workload,
        arrivals=Closed(users),
        requests=tuple(msgspec.structs.replace(part, timeout_ms=None, cancel_share=0.0) for part in workload.requests),
        duration_s=_CAPACITY_WARM_UP_S + duration_s,
        warm_up_s=_CAPACITY_WARM_UP_S,
    )
    with Watch(server.metrics_url, server.pid, server.target.model) as watch:
        recording, _ = generate(closed, server.target, key_file=server.key_file)
    rate = rows_per_s(watch.samples, recording)
    if rate is None:
        capacity_per_s = measure(recording, [], Slo()).throughput_per_s
    else:
        capacity_per_s = rate / statistics.fmean(plan(workload, number).unet_rows for number in range(_PLANNED))
    click.echo(f"Capacity: {capacity_per_s:.3g} requests/s, with {users} in flight for {duration_s:.0f} s", err=True)
    return capacity_per_s


def rows_per_s(samples: Sequence[Sample], recording: Recording) -> float | None:
    """UNet rows per second between the warm-up and the end of sending, from one change of the counter to another, since
    TorchServe brings it up to date batch by batch; None if that is not known."""
    begin = recording.started_at + recording.workload.warm_up_s
    end = recording.started_at + recording.workload.duration_s
    points = [(sample.at_s, sample.metrics["unet_rows"]) for sample in samples if "unet_rows" in sample.metrics]
    changes = [
        point for before, point in itertools.pairwise(points) if point[1] > before[1] and begin <= point[0] <= end
    ]
    if len(changes) < 2:
        return None
    return (changes[-1][1] - changes[0][1]) / (changes[-1][0] - changes[0][0])
