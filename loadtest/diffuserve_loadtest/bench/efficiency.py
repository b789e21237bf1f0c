"""Serving efficiency: images a second of a full server, against the best that its engines do in this process."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

from diffuserve.bundle.manifest import read_manifest
from diffuserve.triton.address import TritonAddress
from diffuserve.triton.configuration import read_options
from diffuserve.triton.launcher import TritonServer
from diffuserve_loadtest.bench.closed_loop import saturation
from diffuserve_loadtest.bench.mixture import Kind
from diffuserve_loadtest.bench.stage_seconds import StageSeconds, mean_of, measure_stages
from diffuserve_loadtest.metrics import read_metrics
from diffuserve_loadtest.report import Plot, Report, Table


def measure_efficiency(bundle: Path, repository: Path, *, steps: int, in_flight: int | None, rounds: int) -> Report:
    """Guided images of one size. Server and engines are measured in turn, so that the machine's slow spells fall on both.

    Args:
        bundle: what the repository was assembled from.
        repository: served as it is.
        steps: of every image.
        in_flight: requests in flight; by default as many as the row budget has rows, which is two calls' worth.
        rounds: how often each is measured; in a round the server gives `2 * in_flight` answers after `in_flight` that
            are not counted.
    """
    model = read_manifest(bundle).model
    max_rows = read_options(repository)[0].max_rows
    in_flight = in_flight or max_rows
    kind = Kind(steps, True, model.width, model.height)
    requests = (kind.fields(number) for number in itertools.count())
    rates, measurements = [], [measure_stages(bundle)]
    with TritonServer(repository, TritonAddress.on_free_ports()) as server:
        for _ in range(rounds):
            rates.append(saturation(server, requests, in_flight=in_flight, warm_up=in_flight, count=2 * in_flight))
            measurements.append(measure_stages(bundle))
        metrics = read_metrics(server.address.metrics)
    served, seconds = statistics.fmean(rates), mean_of(measurements)
    best, batch = seconds.best_images_per_s(steps, max_rows)
    efficiency = served / best
    rows_a_call = metrics["unet_rows"] / metrics["unet_calls"]
    in_calls = metrics["unet_call_seconds_sum"] / metrics["unet_calls"]
    return Report(
        "efficiency",
        {"bundle": str(bundle), "steps": steps, "in_flight": in_flight, "rounds": rounds, "max_rows": max_rows},
        {
            "served_images_per_s": served,
            "best_images_per_s": best,
            "best_batch": batch,
            "efficiency": efficiency,
            "mean_rows_a_call": rows_a_call,
            "mean_call_s": in_calls,
            "served_by_round": rates,
            "engines": [each.to_json() for each in measurements],
        },
        [
            Table(
                f"{steps} steps, {model.width} x {model.height}, guided",
                ("", "images/s"),
                [("served", f"{served:.3f}"), (f"engines in this process, batches of {batch}", f"{best:.3f}")],
            )
        ],
        [
            f"Serving efficiency: {efficiency:.1%}",
            f"A UNet call of the server: {rows_a_call:.1f} rows in {1000 * in_calls:.0f} ms on average.",
        ],
        {"throughput": _plot(seconds, served, steps, max_rows)},
    )


def _plot(seconds: StageSeconds, served: float, steps: int, max_rows: int) -> Plot:
    batches = range(1, max_rows // 2 + 1)
    return Plot(
        {
            "engines in this process": [(images, images / seconds.batch_s(images, steps)) for images in batches],
            "served, mean": [(images, served) for images in (batches[0], batches[-1])],
        },
        "images of a batch",
        "images/s",
    )
