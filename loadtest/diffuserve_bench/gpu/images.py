"""Whole requests in this process, from a text to a PNG: what a server on this card could give at best."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from pathlib import Path

from diffuserve.bundle.manifest import Manifest
from diffuserve.engines.local_stages import EngineStages
from diffuserve.limits import Limits
from diffuserve.pipeline import Pipeline
from diffuserve.request import request_from_fields
from diffuserve.tensors import UNET, VAE_ENCODER
from diffuserve_bench.gpu.model import model_in
from diffuserve_bench.gpu.record import PhaseRecord
from diffuserve_bench.gpu.settings import Settings
from diffuserve_bench.gpu.ways import Way, first_loaded, load
from diffuserve_bench.in_process import closed_loop
from diffuserve_bench.mixture import closed, kind_of
from diffuserve_loadtest.report.summary import throughput
from diffuserve_loadtest.workload.plan import PlannedRequest, plan
from diffuserve_loadtest.workload.workload import Workload


def measure(settings: Settings, record: PhaseRecord) -> None:
    """Guided requests in a closed loop: text encoder, in-flight loop, VAE decoder and PNG, all at once. Each text is new."""
    bundle, manifest = model_in(settings)
    way, unet = first_loaded(bundle, manifest, UNET, settings)
    engines = {UNET: unet}
    for stage in manifest.components.keys() - {UNET, VAE_ENCODER}:
        engines[stage] = load(bundle, manifest, stage, _allowed(manifest, stage, way))
    count, steps = settings.sizes.in_flight, settings.sizes.closed_steps
    workload = closed([kind_of(steps, (manifest.model.width, manifest.model.height))], count)
    # The second time all kernels have been chosen.
    for _ in range(2):
        images_per_s = asyncio.run(_images_per_s(bundle, manifest, EngineStages(engines), workload, count))
    record.figure("whole requests", images_per_s, "images/s to PNG", in_flight=count, steps=steps, **way.settings)


def _allowed(manifest: Manifest, stage: str, way: Way) -> Way:
    """The way itself, or in fp32 what overflows in fp16."""
    if way.precision == "fp16" and manifest.components[stage].overflows_in_fp16:
        return dataclasses.replace(way, precision="fp32")
    return way


async def _images_per_s(
    bundle: Path, manifest: Manifest, stages: EngineStages, workload: Workload, in_flight: int
) -> float:
    limits = Limits.for_model(manifest.model)
    pipeline = Pipeline(bundle, stages, limits)

    async def answer(request: PlannedRequest) -> None:
        async for _ in pipeline.generate(request_from_fields(request.fields, manifest.model, limits)):
            pass  # no progress was asked for

    requests = (plan(workload, number) for number in itertools.count())
    try:
        done_s = await closed_loop(requests, answer, in_flight=in_flight, count=3 * in_flight)
    finally:
        await pipeline.close()
        stages.close()
    return throughput(done_s, in_flight)
