"""One UNet call by its number of rows, on each engine: as a server calls it, from arrays in memory to arrays in memory."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from diffuserve.bundle.manifest import Manifest
from diffuserve.engines.example_inputs import example_inputs
from diffuserve.stages import Engine
from diffuserve.tensors import UNET
from diffuserve_bench.gpu.card import memory_mib
from diffuserve_bench.gpu.model import model_in
from diffuserve_bench.gpu.record import PhaseRecord
from diffuserve_bench.gpu.settings import Settings
from diffuserve_bench.gpu.ways import Way, expected_outputs, load, relative_error, ways
from diffuserve_loadtest.stage_seconds import call_seconds, random_sizes


def measure(settings: Settings, record: PhaseRecord) -> None:
    """For each engine that loads: the first call of each number of rows, those after it, calls of random numbers of rows as
    in-flight batching makes them, memory, and the error of one row."""
    bundle, manifest = model_in(settings)
    for way in ways(settings):
        with record.part(**way.settings):
            _measure_way(bundle, manifest, way, settings, record)


def _measure_way(bundle: Path, manifest: Manifest, way: Way, settings: Settings, record: PhaseRecord) -> None:
    before_mib = memory_mib()
    started_s = time.perf_counter()
    engine = load(bundle, manifest, UNET, way)
    record.figure("load", time.perf_counter() - started_s, "s", **way.settings)
    for rows in settings.sizes.rows:
        with record.part(rows=rows, **way.settings):
            _rows(engine, manifest, rows, way, settings, record)
            if before_mib is not None and (mib := memory_mib()) is not None:
                record.figure("memory of the GPU", mib - before_mib, "MiB", rows=rows, **way.settings)
    _random_rows(engine, manifest, way, settings, record)
    inputs = example_inputs(manifest.components[UNET].tensors, manifest.model, 1)
    outputs = engine(inputs)
    del engine
    error = relative_error(outputs, expected_outputs(bundle, manifest, UNET, inputs))
    record.figure("largest error against fp32 on the CPU", error, "of the output's deviation", **way.settings)


def _rows(engine: Engine, manifest: Manifest, rows: int, way: Way, settings: Settings, record: PhaseRecord) -> None:
    inputs = example_inputs(manifest.components[UNET].tensors, manifest.model, rows)
    record.figure("first call", call_seconds(engine, inputs), "s", rows=rows, **way.settings)
    seconds = statistics.median(call_seconds(engine, inputs) for _ in range(settings.sizes.calls))
    record.figure("call", 1000 * seconds / rows, "ms/row", rows=rows, **way.settings)


def _random_rows(engine: Engine, manifest: Manifest, way: Way, settings: Settings, record: PhaseRecord) -> None:
    """Calls of a number of rows that there has been before, and of one that there has not."""
    sizes = random_sizes(settings.sizes.random_calls, max(settings.sizes.rows), seed=0)
    seen = set(settings.sizes.rows)
    again: list[tuple[int, float]] = []
    new_s: list[float] = []
    for rows in sizes:
        seconds = call_seconds(engine, example_inputs(manifest.components[UNET].tensors, manifest.model, rows))
        if rows in seen:
            again.append((rows, seconds))
        else:
            new_s.append(seconds)
            seen.add(rows)
    if again:
        each = 1000 * sum(seconds for _, seconds in again) / sum(rows for rows, _ in again)
        record.figure("calls of random sizes, seen before", each, "ms/row", calls=len(again), **way.settings)
    if new_s:
        record.figure("calls of random sizes, new", statistics.fmean(new_s), "s/call", calls=len(new_s), **way.settings)
