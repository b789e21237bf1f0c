"""The in-flight loop on one engine, against batches of whole requests and none, and against the engine alone."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from diffuserve.batching.costs import CallCosts
from diffuserve.batching.loop import InflightLoop
from diffuserve.bundle.manifest import Manifest
from diffuserve.engines.example_inputs import Arrays, example_inputs
from diffuserve.engines.local_stages import EngineStages
from diffuserve.limits import Limits
from diffuserve.samplers import NoiseSchedule
from diffuserve.stages import Engine, StageCalls
from diffuserve.stats import Stats
from diffuserve.tensors import UNET
from diffuserve_bench.contenders import INFLIGHT, NONE, REQUEST, Contender
from diffuserve_bench.gpu.arithmetics import Beside, arithmetics_beside
from diffuserve_bench.gpu.model import model_in
from diffuserve_bench.gpu.record import PhaseRecord, Skipped
from diffuserve_bench.gpu.settings import Settings
from diffuserve_bench.gpu.torch_device import precision_on, torch_device
from diffuserve_bench.gpu.torch_models import random_unet
from diffuserve_bench.gpu.ways import Way, first_loaded
from diffuserve_bench.in_process import Answered, closed_loop, job_of, open_loop
from diffuserve_bench.mixture import backlog, closed, kind_of, one_of_each, poisson
from diffuserve_bench.torch_unet import TorchUnet
from diffuserve_loadtest.report.summary import summarise, throughput
from diffuserve_loadtest.stage_seconds import seconds_by_batch
from diffuserve_loadtest.workload.plan import PlannedRequest, plan
from diffuserve_loadtest.workload.workload import Requests, Workload

Result = TypeVar("Result")
Answer = Callable[[PlannedRequest], Awaitable[object]]
SEED = 1


def mixture_of(manifest: Manifest, settings: Settings) -> list[Requests]:
    """Guided requests of the native size that differ in their steps."""
    model = manifest.model
    return [kind_of(steps, (model.width, model.height)) for steps in settings.sizes.steps]


def backlog_of(manifest: Manifest, settings: Settings) -> Workload:
    """Requests of the mixture that are all there at the start."""
    return backlog(mixture_of(manifest, settings), settings.sizes.backlog, SEED)


def measure(settings: Settings, record: PhaseRecord) -> None:
    """On the first engine that loads: a closed loop, with the loop's arithmetic on the host and on the engine's device if
    there is one; the saturation of each way of batching, and Poisson arrivals, as a pipeline would run it. An image ends with
    its latents."""
    bundle, manifest = model_in(settings)
    way, engine = _engine(bundle, manifest, settings)
    max_rows = Limits.for_model(manifest.model).max_rows
    started_s = time.perf_counter()
    for rows in range(2, max_rows + 1, 2):  # what guided requests make
        engine(_inputs(manifest, rows))
    record.figure("first calls of all even sizes", time.perf_counter() - started_s, "s", **way.settings)
    measured = sorted({2, max_rows // 4, max_rows // 2, max_rows})
    arithmetics = []
    for beside in arithmetics_beside(engine):
        seconds = _alone_s(manifest, beside, measured, settings)
        for size, call_s in seconds.items():
            named = {"rows": size, "arithmetic": beside.name, **way.settings}
            record.figure("engine alone", size / call_s, "rows/s", **named)
        arithmetics.append(_Served(manifest, beside, CallCosts(seconds), max_rows))
    for each in arithmetics:
        with record.part(figure="closed loop", arithmetic=each.beside.name, **way.settings):
            _closed_loop(each, way, settings, record)
    _open_loop(arithmetics[0], way, settings, record)


def _engine(bundle: Path, manifest: Manifest, settings: Settings) -> tuple[Way, Engine]:
    """PyTorch, eager, where no engine loads."""
    try:
        return first_loaded(bundle, manifest, UNET, settings)
    except Skipped as lack:
        try:
            device = torch_device(settings)
            precision, dtype = precision_on(device)
            return Way("pytorch", precision), TorchUnet(random_unet(bundle, device, dtype))
        except (ModuleNotFoundError, Skipped) as error:
            raise Skipped(f"{lack} And PyTorch: {error}") from error


def _inputs(manifest: Manifest, rows: int) -> Arrays:
    return example_inputs(manifest.components[UNET].tensors, manifest.model, rows)


def _alone_s(manifest: Manifest, beside: Beside, sizes: Sequence[int], settings: Settings) -> dict[int, float]:
    """Seconds of a call of the engine alone by rows, its inputs where the arithmetic is."""
    return seconds_by_batch(beside, lambda rows: beside.inputs(_inputs(manifest, rows)), sizes, settings.sizes.calls)


@dataclass
class _Served:
    """A model's UNet behind a loop; each use has a loop of its own."""

    manifest: Manifest
    beside: Beside
    costs: CallCosts
    max_rows: int
    stats: Stats = field(default_factory=Stats)

    def use(self, contender: Contender, user: Callable[[Answer], Awaitable[Result]]) -> Result:
        """Runs `user` with the loop's answer to a request, its latents."""
        return asyncio.run(self._use(contender, user))

    async def _use(self, contender: Contender, user: Callable[[Answer], Awaitable[Result]]) -> Result:
        self.stats = Stats()
        stages = EngineStages({UNET: self.beside.engine})
        loop = InflightLoop(
            StageCalls(stages).denoise,
            contender.selection(self.max_rows, self.costs),
            arithmetic=self.beside.arithmetic,
            max_active_images=Limits.for_model(self.manifest.model).max_active_images,
            stats=self.stats,
        )
        schedule = NoiseSchedule.from_config(self.manifest.scheduler)
        text = {name: array[0] for name, array in _inputs(self.manifest, 1).items()}
        shape = text.pop("sample").shape
        del text["timestep"]
        try:
            return await user(lambda request: loop.denoise(job_of(request, schedule, shape, text, time.monotonic())))
        finally:
            await loop.close()
            stages.close()

    @property
    def rows_a_call(self) -> float:
        """Of the last use."""
        return self.stats.total("unet_rows") / max(1, self.stats.total("unet_calls"))


def _closed_loop(served: _Served, way: Way, settings: Settings, record: PhaseRecord) -> None:
    """So many guided requests as fill the row budget, always one more; the engine alone is timed before and behind."""
    count, steps = settings.sizes.in_flight, settings.sizes.closed_steps
    model = served.manifest.model
    workload = closed([kind_of(steps, (model.width, model.height))], count)
    rows_a_step = plan(workload, 0).rows
    rows = min(count * rows_a_step, served.max_rows)

    def alone_per_s() -> float:
        return rows / _alone_s(served.manifest, served.beside, (rows,), settings)[rows]

    before = alone_per_s()
    requests = (plan(workload, number) for number in itertools.count())
    done_s = served.use(INFLIGHT, lambda answer: closed_loop(requests, answer, in_flight=count, count=3 * count))
    images_per_s = throughput(done_s, count)
    alone = (before + alone_per_s()) / 2
    named = {"in_flight": count, "steps": steps, "arithmetic": served.beside.name, **way.settings}
    record.figure("closed loop", images_per_s, "images/s to latents", **named)
    share = images_per_s * steps * rows_a_step / alone
    record.figure("closed loop over the engine alone", share, "of its rows/s", **named)
    record.figure("closed loop", served.rows_a_call, "rows/call", **named)


def _open_loop(served: _Served, way: Way, settings: Settings, record: PhaseRecord) -> None:
    mixture, all_at_once = mixture_of(served.manifest, settings), backlog_of(served.manifest, settings)
    contenders = (REQUEST, INFLIGHT, NONE)

    def run(contender: Contender, workload: Workload) -> Answered:
        return served.use(contender, lambda answer: open_loop(workload, answer))

    alone_s = {
        one_of_each(alone)[0].kind: min(run(INFLIGHT, alone).latency_s[0] for _ in range(2))
        for alone in (backlog([kind], 1, SEED) for kind in mixture)
    }
    saturations = {}
    for contender in contenders:
        saturations[contender] = run(contender, all_at_once).throughput_per_s
        named = {"batching": contender.name, "requests": settings.sizes.backlog, **way.settings}
        record.figure("saturation", saturations[contender], "images/s to latents", **named)
        record.figure("saturation", served.rows_a_call, "rows/call", **named)
    for load in settings.sizes.loads:
        workload = poisson(mixture, load * saturations[REQUEST], settings.sizes.arrivals, SEED)
        for contender in contenders:
            outcome = run(contender, workload)
            latency_s = summarise(outcome.latency_s)
            slowdown = summarise(
                [
                    each_s / alone_s[request.kind]
                    for each_s, request in zip(outcome.latency_s, outcome.requests, strict=True)
                ]
            )
            named = {"batching": contender.name, "load": load, **way.settings}
            record.figure("latency, mean", latency_s.mean, "s", **named)
            record.figure("latency, p95", latency_s.p95, "s", **named)
            record.figure("slowdown, p95", slowdown.p95, "of the time alone", **named)
            record.figure("late", outcome.late, "requests", **named)
