"""A request's way from text to image files: encode the prompt, denoise in the shared loop, decode and check, encode the
files.

Each request is a coroutine of its own; only the denoising is shared. So text encoding, VAE decoding and file encoding
overlap with the loop, and one request's failure is an exception in its own coroutine.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffuserve.batching.admission import Admission
from diffuserve.batching.arithmetic import Arithmetic
from diffuserve.batching.costs import CallCosts
from diffuserve.batching.jobs import Job, LatentShape
from diffuserve.batching.ledger import Entry, Ledger
from diffuserve.batching.load import Neighbours
from diffuserve.batching.loop import InflightLoop
from diffuserve.batching.numpy_arithmetic import NumpyArithmetic
from diffuserve.batching.policies import POLICIES
from diffuserve.batching.request_selection import RequestSelection
from diffuserve.batching.selection import InflightSelection, Selection
from diffuserve.bundle.manifest import read_manifest
from diffuserve.conditioning import conditioning_from_request
from diffuserve.errors import DeadlineExceeded, Draining, QueueFull
from diffuserve.events import Accepted, Completed, Event, Progressed
from diffuserve.images.decoding import Decoder
from diffuserve.images.encoding import encode_image
from diffuserve.images.infotext import infotext
from diffuserve.images.previews import preview_from_latents
from diffuserve.images.safety import refuse_without_safety_checker
from diffuserve.limits import Limits
from diffuserve.request import TextToImageRequest
from diffuserve.request_warnings import request_warnings
from diffuserve.samplers import NoiseSchedule, trajectory
from diffuserve.serving_options import Serving
from diffuserve.stages import Float32, StageCalls, Stages
from diffuserve.stats import Stats
from diffuserve.tensors import UNET
from diffuserve.text.embeddings import TextEmbeddings
from diffuserve.text.tokenizer import tokenizers_of

if TYPE_CHECKING:
    import torch

REPORT_WAITING_S = 5.0


@dataclass(frozen=True)
class _Step:
    """A step done; `denoised`: (n, C, h, w) float32, where a preview is wanted."""

    step: int
    eta_s: float
    denoised: Float32 | None


_Steps = asyncio.Queue[_Step | None]


class Pipeline:
    """Everything that one bundle needs to answer requests, over whatever stages it is given.

    Args:
        bundle: folder with manifest.json and the tokenizers; the components are the stages' business.
        stages: the engine calls.
        limits: what is accepted; by default the model's own.
        serving: how it is served.
        neighbours: other models on the device that runs the UNet.

    Raises:
        BundleError: the bundle is damaged, or lacks the safety checker that `serving` requires.
    """

    def __init__(
        self,
        bundle: Path,
        stages: Stages,
        limits: Limits | None = None,
        serving: Serving | None = None,
        *,
        neighbours: Neighbours | None = None,
    ) -> None:
        serving = serving or Serving()
        self.manifest = read_manifest(bundle)
        if serving.require_safety_checker:
            refuse_without_safety_checker(self.manifest)
        self.limits = limits or Limits.for_model(self.manifest.model)
        self._schedule = NoiseSchedule.from_config(self.manifest.scheduler)
        self.stats = Stats()
        calls = StageCalls(stages, serving.call_timeout_s)
        self._embeddings = TextEmbeddings(
            tokenizers_of(bundle, self.manifest),
            calls,
            self.stats,
            max_chunks=self.limits.max_prompt_chunks,
            zero_empty_negative=self.manifest.model.zero_empty_negative,
        )
        selection = selection_from_serving(serving, self.limits.max_rows, CallCosts(self.manifest.unet_seconds))
        self._ledger = Ledger()
        self._admission = Admission(self._ledger, selection.max_rows, serving.unet_instances, neighbours)
        self._loop = InflightLoop(
            calls.denoise,
            selection,
            arithmetic=arithmetic_on(stages.unet_device, serving.call_timeout_s),
            max_active_images=self.limits.max_active_images,
            instances=serving.unet_instances,
            stats=self.stats,
            on_call=self._admission.observe_call,
        )
        # A pool of its own, so that work on images never waits for, or delays, calls of the stages.
        self._encoders = ThreadPoolExecutor(2, thread_name_prefix="image encoder")
        self._decoder = Decoder(self.manifest, calls, self._encoders, self.stats)
        self._draining = False

    def gauges(self) -> dict[str, int]:
        """The gauges of `diffuserve.stats.METRICS`."""
        return self._ledger.gauges()

    def drain(self) -> None:
        """Refuses every request from now on; those accepted go on."""
        self._draining = True

    async def close(self) -> None:
        """Stops the loop; requests still in it fail."""
        await self._loop.close()
        self._encoders.shutdown()

    async def generate(self, request: TextToImageRequest) -> AsyncGenerator[Event, None]:
        """Yields `Accepted`, if the request asks for progress a `Progressed` per step, and `Completed`.

        Closing the iterator, or cancelling the task that reads it, frees the request's rows at the next step.

        Raises:
            Draining: the server is shutting down.
            QueueFull: too many requests wait already, or it could not be finished within its `timeout_ms` beside them.
            DeadlineExceeded: the request's `timeout_ms` passed.
            StageFailed: an engine failed, or returned values that are not finite.
        """
        self._refuse_if_full(request)
        entry = self._entry(request)
        steps: _Steps = asyncio.Queue()
        self._ledger.add(entry)
        self._admission.tell()
        drawing = asyncio.create_task(self._draw_in_time(request, steps, entry))
        drawing.add_done_callback(lambda _: steps.put_nowait(None))
        try:
            yield Accepted(request.steps, self._ledger.position(entry))
            async for event in self._progress(request, steps, entry):
                if request.progress:
                    yield event
            completed = await drawing
            self._count_completed(completed)
            yield completed
        except (asyncio.CancelledError, GeneratorExit):
            if not drawing.done():
                self.stats.count("requests_cancelled")
            raise
        except DeadlineExceeded:
            self.stats.count("requests_expired")
            raise
        except Exception:
            self.stats.count("requests_failed")
            raise
        finally:
            drawing.cancel()
            await asyncio.gather(drawing, return_exceptions=True)
            self._ledger.remove(entry)
            self._admission.tell()

    async def _progress(
        self, request: TextToImageRequest, steps: _Steps, entry: Entry
    ) -> AsyncIterator[Accepted | Progressed]:
        while True:
            timeout_s = None if entry.begun else REPORT_WAITING_S
            try:
                step = await asyncio.wait_for(steps.get(), timeout_s)
            except TimeoutError:
                yield Accepted(request.steps, self._ledger.position(entry))
                continue
            if step is None:
                return
            previews = await self._previews(step) if request.progress else ()
            yield Progressed(step.step, request.steps, step.eta_s, previews)

    def _count_completed(self, completed: Completed) -> None:
        images = len(completed.images)
        self.stats.count("requests_completed")
        self.stats.count("images", images)
        self.stats.count("images_withheld", sum(completed.flagged))
        self.stats.observe("request_seconds", completed.total_s)
        self.stats.observe("image_seconds", completed.total_s / images)

    def _refuse_if_full(self, request: TextToImageRequest) -> None:
        if self._draining:
            self.stats.count("requests_refused")
            raise Draining("The server is shutting down and takes no new requests. Send it to another, or again later.")
        waiting = self._ledger.waiting
        rows = sum(entry.rows for entry in waiting)
        full = len(waiting) >= self.limits.max_waiting_requests or rows + request.rows > self.limits.max_waiting_rows
        if waiting and full:
            rows_per_s = self._loop.rows_per_s
            raise self._queue_full(
                f"{len(waiting)} requests of {rows} rows are waiting, and no more are queued.",
                self._ledger.rows_left / rows_per_s if rows_per_s else 1.0,
            )

    def _queue_full(self, why: str, seconds: float) -> QueueFull:
        """Counts a refusal; `seconds`: after which there is room again, as far as can be told."""
        self.stats.count("requests_refused")
        retry_after_s = min(60.0, max(0.1, seconds))
        return QueueFull(f"{why} Try again in {retry_after_s:.1f} s.", retry_after_s)

    def _entry(self, request: TextToImageRequest) -> Entry:
        """Raises QueueFull if it, or one that has been accepted, would be late."""
        now_s = time.monotonic()
        entry = Entry(
            shape=self._latent_shape(request),
            chunks=self._embeddings.chunks(*_prompts(request)),
            images=request.num_images,
            rows_per_image=request.rows_per_image,
            evaluations_left=trajectory(self._schedule, request.sampler, request.steps).evaluations,
            priority=request.priority,
            end_s=now_s + request.timeout_ms / 1000 if request.timeout_ms else math.inf,
        )
        excess_s = self._admission.excess_s(entry, now_s)
        if excess_s > 0:
            here, elsewhere = len(self._ledger), self._admission.requests_elsewhere
            others = f", {elsewhere} of them by other models on the same device" if elsewhere else ""
            raise self._queue_full(
                f"{here + elsewhere} requests are being drawn{others}, so that this one or one of them would not be "
                "finished within its timeout_ms.",
                excess_s,
            )
        return entry

    def _latent_shape(self, request: TextToImageRequest) -> LatentShape:
        model = self.manifest.model
        return (
            model.latent_channels,
            request.height // model.vae_scale_factor,
            request.width // model.vae_scale_factor,
        )

    async def _draw_in_time(self, request: TextToImageRequest, steps: _Steps, entry: Entry) -> Completed:
        timeout_s = request.timeout_ms / 1000 if request.timeout_ms else None
        try:
            return await asyncio.wait_for(self._draw(request, steps, entry), timeout_s)
        except TimeoutError:
            raise DeadlineExceeded(
                f"The request was not finished within its timeout_ms of {request.timeout_ms}. "
                "Allow more time, fewer steps or fewer images."
            ) from None

    async def _draw(self, request: TextToImageRequest, steps: _Steps, entry: Entry) -> Completed:
        arrival_s = time.monotonic()
        prompts = _prompts(request)
        conditional, unconditional = await self._embeddings.get_pair(*prompts)

        def on_step(step: int, denoised: Float32 | None) -> None:
            first_s = job.first_step_s or arrival_s
            if not entry.begun:
                entry.begun = True
                self.stats.observe("first_step_seconds", first_s - arrival_s)
            per_step_s = (time.monotonic() - (first_s if step > 1 else arrival_s)) / max(step - 1, 1)
            steps.put_nowait(_Step(step, per_step_s * (request.steps - step), denoised))
            entry.evaluations_left = math.ceil(job.rows_left / request.rows)

        added = conditioning_from_request(request, self.manifest.components[UNET].tensors)
        job = Job(
            trajectory=trajectory(self._schedule, request.sampler, request.steps),
            shape=entry.shape,
            seeds=request.seeds,
            conditioning={**conditional, **added},
            unconditional=None if unconditional is None else {**unconditional, **added},
            guidance_scale=request.guidance_scale,
            priority=request.priority,
            arrival_s=arrival_s,
            client_id=request.client_id,
            # A preview would show what the safety checker may withhold.
            preview_every=0 if self.manifest.has_safety_checker else request.preview,
            on_step=on_step,
        )
        joined_s = time.monotonic()
        latents = await self._loop.denoise(job)
        pixels, flags = await self._decoder.decode(latents, request.width, request.height)
        flagged = tuple(flags.tolist())
        padded = self._embeddings.pads(*prompts)
        parameters = tuple(infotext(request, self.manifest, seed, padded=padded) for seed in request.seeds)
        images = await asyncio.gather(
            *(
                self._off_loop(encode_image, image, request.format, text)
                for image, text in zip(pixels, parameters, strict=True)
            )
        )
        admitted_s = job.admitted_s or arrival_s
        done_s = time.monotonic()
        self._admission.observe_outside(joined_s - arrival_s + done_s - job.last_step_s)
        return Completed(
            images=tuple(images),
            pixels=pixels,
            flagged=flagged,
            seeds=request.seeds,
            parameters=parameters,
            warnings=request_warnings(request, flagged, self.manifest, self.limits, self._embeddings),
            queue_s=admitted_s - arrival_s,
            denoise_s=job.last_step_s - admitted_s,
            total_s=done_s - arrival_s,
        )

    async def _previews(self, step: _Step) -> tuple[bytes, ...]:
        if step.denoised is None:
            return ()
        return tuple(await asyncio.gather(*(self._off_loop(self._preview, latents) for latents in step.denoised)))

    def _preview(self, latents: Float32) -> bytes:
        return encode_image(preview_from_latents(latents, self.manifest.preview), "png")

    def _off_loop(self, function: Callable[..., bytes], *args: object) -> asyncio.Future[bytes]:
        return asyncio.get_running_loop().run_in_executor(self._encoders, function, *args)


def _prompts(request: TextToImageRequest) -> tuple[str, str | None]:
    """What is embedded."""
    return request.prompt, request.negative_prompt if request.guided else None


def selection_from_serving(serving: Serving, max_rows: int, costs: CallCosts) -> Selection:
    """What chooses the rows of each UNet call.

    Args:
        serving: its batching and policy.
        max_rows: of one call, at most.
        costs: of a call by rows.
    """
    if serving.batching == "inflight":
        return InflightSelection(max_rows, POLICIES[serving.policy], costs)
    return RequestSelection(max_rows, together=serving.batching == "request")


def arithmetic_on(device: torch.device | None, timeout_s: float) -> Arithmetic:
    """What the loop computes with besides the UNet.

    Args:
        device: `Stages.unet_device`.
        timeout_s: seconds after which it counts as hung.
    """
    if device is None:
        return NumpyArithmetic()
    from diffuserve.batching.torch_arithmetic import TorchArithmetic
    from diffuserve.batching.torch_transfers import TorchTransfers

    return TorchArithmetic(TorchTransfers(device, timeout_s))
