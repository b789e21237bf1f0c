"""The comparison: every contender alone on the machine, with the same requests at the same times.

First each is given a backlog to answer as fast as it can, which is its saturation; then, in rounds, Poisson arrivals at shares
of the slowest one's saturation. The first round goes in the reverse order and repeats the backlog, so that a machine that grows
slower or faster does not favour those that come first.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import click
import msgspec

from diffuserve.torchserve.keys import read_inference_token
from diffuserve_loadtest.report.report import Report
from diffuserve_loadtest.report.summary import summarise
from diffuserve_loadtest.sending.generator import generate
from diffuserve_loadtest.sending.records import OK, Recording
from diffuserve_loadtest.server.under_test import UnderTest
from diffuserve_loadtest.server.watch import Watch
from diffuserve_loadtest.workload.arrivals import Bursts, Poisson
from diffuserve_loadtest.workload.plan import plan
from diffuserve_loadtest.workload.workload import Requests, Workload
from diffuserve_peers.contenders import Contender
from diffuserve_peers.figures import Figures, report_on

LOADS = (0.5, 0.8)
_WARM_UP_REQUESTS = 8
_PATIENCE_S = 400.0
_FIRST_IMAGE_TIMEOUT_S = 120.0


def compare_peers(
    contenders: Sequence[Contender],
    requests: Requests,
    *,
    backlog: int,
    seconds: float,
    rounds: int,
    settings: dict[str, object],
) -> Report:
    """Runs the comparison.

    Args:
        contenders: one or more.
        requests: what is asked for.
        backlog: requests that are sent at once to measure the saturation.
        seconds: of each load in each round.
        rounds: of the loads; each has other requests at other times, the same for all contenders.
        settings: for the report.

    Raises:
        LaunchError: a contender did not start.
        click.ClickException: a contender answered its first requests with errors.
    """
    figures = {contender.name: Figures(contender.setup_lines) for contender in contenders}
    for contender in contenders:
        with _running(contender, requests, figures[contender.name]) as server:
            _saturate(server, requests, backlog, contender.name, figures[contender.name])
    slowest_per_s = min(each.saturation_per_s for each in figures.values())
    for number in range(rounds):
        for contender in contenders if number % 2 else reversed(contenders):
            mine = figures[contender.name]
            with _running(contender, requests, mine) as server:
                for load in LOADS:
                    arrivals = Poisson(rate_per_s=load * slowest_per_s)
                    workload = _workload(requests, arrivals, seconds, seed=number + 1)
                    recording = _generate(workload, server, mine)
                    mine.add_load(load, recording)
                    _tell(contender.name, load, recording)
                if number == 0:
                    _saturate(server, requests, backlog, contender.name, mine)
    return report_on(figures, settings)


def uniform(steps: int | tuple[int, ...]) -> Requests:
    """Guided requests of the native size that differ in prompt and seed, and in steps if there are several."""
    return Requests(steps=steps, sampler="dpmpp_2m")


@contextlib.contextmanager
def _running(contender: Contender, requests: Requests, figures: Figures) -> Iterator[UnderTest]:
    """Started, warmed up and watched."""
    started_s = time.perf_counter()
    with contender.start() as server, Watch(None, server.pid) as watch:
        figures.image = draw_one(server, requests)
        figures.first_image_s.append(time.perf_counter() - started_s)
        _warm_up(server, requests)
        yield server
    figures.peak_bytes = max(figures.peak_bytes, *(sample.proportional_bytes for sample in watch.samples))


def draw_one(server: UnderTest, requests: Requests) -> bytes:
    """The file of the workload's first image."""
    from diffuserve_loadtest.sending.http_transport import HttpTransport

    token = read_inference_token(server.key_file) if server.key_file else None
    transport = HttpTransport(msgspec.structs.replace(server.target, token=token), 1, timeout_s=_FIRST_IMAGE_TIMEOUT_S)
    [file] = transport.send(plan(_workload(requests, _burst(1), 1.0), 0)).files
    return file


def _warm_up(server: UnderTest, requests: Requests) -> None:
    recording, _ = generate(
        _workload(requests, _burst(_WARM_UP_REQUESTS), 1.0), server.target, key_file=server.key_file
    )
    for record in recording.records:
        if record.outcome != OK:
            raise click.ClickException(f"{server.target.url} does not answer: {record.outcome}: {record.message}")


def _saturate(server: UnderTest, requests: Requests, backlog: int, name: str, figures: Figures) -> None:
    figures.add_backlog(_generate(_workload(requests, _burst(backlog), 1.0), server, figures))
    click.echo(f"{name}: {figures.saturations_per_s[-1]:.3f} images/s", err=True)


def _generate(workload: Workload, server: UnderTest, figures: Figures) -> Recording:
    recording, kept_up = generate(workload, server.target, key_file=server.key_file)
    if not kept_up:
        late = sum(record.late for record in recording.records)
        figures.late.append(f"the generator sent {late} of {len(recording.records)} requests late.")
    return recording


def _tell(name: str, load: float, recording: Recording) -> None:
    answered_s = [record.latency_s for record in recording.records if record.outcome == OK]
    p95 = f"{summarise(answered_s).p95:.2f} s" if answered_s else "none"
    click.echo(f"{name}: p95 {p95} at {load:.0%}, {len(answered_s)} of {len(recording.records)} answered", err=True)


def _burst(size: int) -> Bursts:
    """All at once, once in a second."""
    return Bursts(rate_per_s=size, size=size)


def _workload(requests: Requests, arrivals: Poisson | Bursts, duration_s: float, seed: int = 1) -> Workload:
    return Workload(
        "A comparison of servers.",
        arrivals,
        (requests,),
        duration_s=duration_s,
        warm_up_s=0.0,
        seed=seed,
        patience_s=_PATIENCE_S,
    )
