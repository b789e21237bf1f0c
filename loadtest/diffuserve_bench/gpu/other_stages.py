"""The stages around the UNet on each engine, by how many texts or images a call takes."""

from __future__ import annotations

import time
from pathlib import Path

from diffuserve.bundle.manifest import Manifest
from diffuserve.engines.example_inputs import example_inputs
from diffuserve.tensors import TEXT_ENCODER, VAE_DECODER, VAE_ENCODER
from diffuserve_bench.gpu.model import model_in
from diffuserve_bench.gpu.record import PhaseRecord
from diffuserve_bench.gpu.settings import Settings
from diffuserve_bench.gpu.ways import Way, expected_outputs, load, relative_error, ways
from diffuserve_loadtest.stage_seconds import seconds_by_batch


def measure(settings: Settings, record: PhaseRecord) -> None:
    """Time of a call, and the error of one item."""
    bundle, manifest = model_in(settings)
    for way in ways(settings):
        for stage in (VAE_DECODER, TEXT_ENCODER, VAE_ENCODER):
            with record.part(stage=stage, **way.settings):
                _measure_stage(bundle, manifest, stage, way, settings, record)


def _measure_stage(
    bundle: Path, manifest: Manifest, stage: str, way: Way, settings: Settings, record: PhaseRecord
) -> None:
    tensors = manifest.components[stage].tensors
    started_s = time.perf_counter()
    engine = load(bundle, manifest, stage, way)
    record.figure("convert and load", time.perf_counter() - started_s, "s", stage=stage, **way.settings)
    for batch in settings.sizes.batches:
        seconds = seconds_by_batch(
            engine, lambda size: example_inputs(tensors, manifest.model, size), (batch,), settings.sizes.calls
        )[batch]
        record.figure("call", 1000 * seconds / batch, "ms each", batch=batch, stage=stage, **way.settings)
    inputs = example_inputs(tensors, manifest.model, 1)
    outputs = engine(inputs)
    error = relative_error(outputs, expected_outputs(bundle, manifest, stage, inputs))
    record.figure(
        "largest error against fp32 on the CPU", error, "of the output's deviation", stage=stage, **way.settings
    )
