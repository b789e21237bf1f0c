"""Serving efficiency: images per second of a full server, against the best that its engines do in this process."""

from __future__ import annotations

import statistics
from pathlib import Path

import msgspec

from diffuserve.bundle.manifest import read_manifest
from diffuserve.triton.address import TritonAddress
from diffuserve.triton.configuration import read_options
from diffuserve.triton.launcher import TritonServer
from diffuserve_bench.mixture import closed, kind_of
from diffuserve_loadtest.report.report import Plot, Report, Table
from diffuserve_loadtest.report.summary import throughput
from diffuserve_loadtest.sending.generator import generate
from diffuserve_loadtest.sending.records import all_answered
from diffuserve_loadtest.sending.target import Target
from diffuserve_loadtest.server.metrics import read_metrics
from diffuserve_loadtest.stage_seconds import StageSeconds, mean_of, measure_stages


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
    rates, measurements = [], [measure_stages(bundle)]
    with TritonServer(repository, TritonAddress.on_free_ports()) as server:
        for number in range(rounds):
            rates.append(_saturation_per_s(server, steps, (model.width, model.height), in_flight, number))
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


def _saturation_per_s(server: TritonServer, steps: int, size: tuple[int, int], in_flight: int, number: int) -> float:
    """Images a second while there is always one more, so that of four rounds of requests the last answers do not count."""
    kind = kind_of(steps, size)
    fresh = msgspec.structs.replace(
        kind, prompt=f"{kind.prompt} of round {number}"
    )  # no text is known from the last round
    recording, _ = generate(closed([fresh], in_flight, 4 * in_flight), Target("triton-grpc", server.address.grpc))
    done_s = sorted(record.done_s for record in all_answered(recording))
    return throughput(done_s[: 3 * in_flight], in_flight)


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
