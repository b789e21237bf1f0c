"""One UNet call on each way that a CPU has to run it.

Every way is timed in turns with the reference, ONNX Runtime in fp32, so that a slow spell of the machine falls on both
alike. Beside the reference one other way is loaded at a time: a UNet of gigabytes is in memory twice and no more often.
"""

from __future__ import annotations

import gc
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec

from diffuserve.bundle.checksums import verify
from diffuserve.bundle.manifest import ModelSpec, read_manifest
from diffuserve.engines.example_inputs import example_inputs
from diffuserve.errors import BundleError
from diffuserve.stages import Engine
from diffuserve.tensors import UNET
from diffuserve_bench.arithmetic import flops_of_onnx, matrix_product_flops_per_s
from diffuserve_bench.unet_ways import Arrays, Way, load, operator_seconds, ways
from diffuserve_loadtest.report.report import Report, Table
from diffuserve_loadtest.stage_seconds import call_seconds

_OPERATORS_SHOWN = 8


@dataclass(frozen=True)
class Measured:
    """Seconds of calls in turns with the reference's; `operators`: seconds of a call by type of operator."""

    way: Way
    call_s: list[float]
    reference_s: list[float]
    operators: dict[str, float]

    @property
    def seconds(self) -> float:
        return statistics.median(self.call_s)

    @property
    def ratio(self) -> float:
        return self.seconds / statistics.median(self.reference_s)


def measure_unet(
    bundle: Path, *, checkpoint: Path | None, size: tuple[int, int] | None, rows: int, rounds: int
) -> Report:
    """Measures every way that this machine has, and lists the others with what they lack.

    Args:
        bundle: its UNet's exported graph is run, whatever engine has been selected for it.
        checkpoint: a folder in diffusers' format, for PyTorch; None leaves PyTorch out.
        size: width and height in pixels; None is the native one.
        rows: of a call.
        rounds: timed calls of each.

    Raises:
        BundleError, CheckpointError: the bundle or checkpoint is damaged, or does not take the size.
    """
    manifest = read_manifest(bundle)
    verify(bundle, manifest)
    model = _sized(manifest.model, size)
    graph = bundle / UNET / "model.onnx"
    inputs = example_inputs(manifest.components[UNET].tensors, model, rows)
    flops = flops_of_onnx(graph, inputs)
    peaks: dict[str, float] = {}
    measured: list[Measured] = []
    every = ways(graph, checkpoint)
    reference = load(every[0], inputs)
    for way in every:
        if way.lack:
            continue
        click.echo(f"{way} ...", err=True)
        if (peak := matrix_product_flops_per_s(way.precision)) is not None:
            peaks[way.precision] = max(peak, peaks.get(way.precision, 0))
        # ONNX Runtime itself is timed against a second copy: how far the ratio is from 1 is the noise.
        reference_s, call_s = _in_turns(reference, load(way, inputs), inputs, rounds)
        gc.collect()
        measured.append(Measured(way, call_s, reference_s, operator_seconds(way, inputs)))
        gc.collect()
    return Report(
        "unet",
        {
            "bundle": str(bundle),
            "checkpoint": None if checkpoint is None else str(checkpoint),
            "width": model.width,
            "height": model.height,
            "rows": rows,
            "rounds": rounds,
        },
        {
            "flops": flops,
            "matrix_product_flops_per_s": peaks,
            "ways": [_to_json(each, flops, peaks) for each in measured],
            "cannot_run_here": {str(way): way.lack for way in every if way.lack},
        },
        [
            _table(model, rows, measured, flops, peaks),
            *(_operator_table(each) for each in measured),
        ],
        [
            *(f"{way} cannot run here: {way.lack}." for way in every if way.lack),
            f"A call is {flops / 1e9:.2f} GFLOP in convolutions and matrix products, counted in the ONNX graph with the "
            "shapes of a run. The peak is the best product of two 2048 x 2048 matrices in the same precision and run: "
            + ", ".join(f"{peak / 1e9:.0f} GFLOP/s in {precision}" for precision, peak in peaks.items())
            + ".",
            "Each way was timed in turns with onnxruntime fp32, one at a time beside it; the ratio is to those calls.",
        ],
    )


def _sized(model: ModelSpec, size: tuple[int, int] | None) -> ModelSpec:
    if size is None:
        return model
    width, height = size
    if min(size) < 1 or width % model.size_multiple or height % model.size_multiple:
        raise BundleError(
            f"The size {width}x{height} does not fit {model.name}: both must be multiples of {model.size_multiple} pixels."
        )
    return msgspec.structs.replace(model, width=width, height=height)


def _in_turns(reference: Engine, other: Engine, inputs: Arrays, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of both's calls, after one each that is not counted. Who begins changes from round to round."""
    engines = (reference, other)
    times_s: tuple[list[float], list[float]] = ([], [])
    for engine in engines:
        engine(inputs)
    for number in range(rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            times_s[which].append(call_seconds(engines[which], inputs))
    return times_s


def _to_json(measured: Measured, flops: int, peaks: dict[str, float]) -> dict[str, Any]:
    way = measured.way
    rate = flops / measured.seconds
    return {
        "engine": way.engine,
        "precision": way.precision,
        "shapes": way.shapes,
        "call_s": measured.call_s,
        "reference_s": measured.reference_s,
        "seconds": measured.seconds,
        "ratio": measured.ratio,
        "flops_per_s": rate,
        "of_peak": rate / peaks[way.precision] if way.precision in peaks else None,
        "operator_s": measured.operators,
    }


def _table(model: ModelSpec, rows: int, measured: list[Measured], flops: int, peaks: dict[str, float]) -> Table:
    lines = []
    for each in measured:
        line = _to_json(each, flops, peaks)
        share = "" if line["of_peak"] is None else f"{100 * line['of_peak']:.0f} %"
        shown = (f"{each.seconds:.4f}", f"{each.ratio:.2f}", f"{line['flops_per_s'] / 1e9:.1f}", share)
        lines.append((each.way.engine, each.way.precision, each.way.shapes, *shown))
    title = f"One call of {rows} rows at {model.width}x{model.height}"
    return Table(title, ("engine", "precision", "shapes", "s", "of onnxruntime", "GFLOP/s", "of the peak"), lines)


def _operator_table(measured: Measured) -> Table:
    total_s = sum(measured.operators.values())
    most = list(measured.operators.items())[:_OPERATORS_SHOWN]
    others_s = total_s - sum(each_s for _, each_s in most)
    rows = [
        (name, f"{1000 * each_s:.1f}", f"{100 * each_s / total_s:.1f} %")
        for name, each_s in [*most, ("others", others_s)]
    ]
    return Table(f"{measured.way}: where the time goes", ("operator", "ms", "share"), rows)
