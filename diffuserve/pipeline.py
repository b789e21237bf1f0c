"""A request's way from text to image files: encode the prompt, denoise in the shared loop, decode, encode the files.

Each request is a coroutine of its own; only the denoising is shared. So text encoding, VAE decoding and file encoding
overlap with the loop, and one request's failure is an exception in its own coroutine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffuserve.bundle import read_manifest
from diffuserve.errors import DeadlineExceeded, Draining, QueueFull, StageFailed
from diffuserve.images import encode_image, preview_from_latents
from diffuserve.inflight import InflightLoop, Job
from diffuserve.infotext import infotext
from diffuserve.policies import POLICIES
from diffuserve.request import Limits, TextToImageRequest
from diffuserve.samplers import NoiseSchedule, trajectory
from diffuserve.stages import Float32, Stages, checked
from diffuserve.tensors import VAE_DECODER
from diffuserve.text_embeddings import TextEmbeddings
from diffuserve.tokenizer import Tokenizer

# Images of one VAE call: activations at full image size are the largest of all stages.
MAX_DECODE_BATCH = 8


@dataclass(frozen=True)
class Accepted:
    """The request has been checked and will be worked on."""

    steps: int


@dataclass(frozen=True)
class Progress:
    """All images of the request have done `step` of `steps`; `previews` are small PNG files, one an image, or none."""

    step: int
    steps: int
    previews: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Completed:
    """The finished request.

    `images`: one file an image in the request's format (raw: H x W x 3 bytes, row by row); `pixels`: (n, H, W, 3) uint8;
    `parameters`: what drew each image, as text; `queue_s`: from arrival to the first step done; `denoise_s`: from there
    to the last; `total_s`: from arrival to this event.
    """

    images: tuple[bytes, ...]
    pixels: NDArray[np.uint8] = field(repr=False)
    seeds: tuple[int, ...]
    parameters: tuple[str, ...]
    warnings: tuple[str, ...]
    queue_s: float
    denoise_s: float
    total_s: float


Event = Accepted | Progress | Completed


@dataclass(frozen=True)
class _Step:
    """A step done; `denoised`: (n, C, h, w) float32, where a preview is wanted."""

    step: int
    denoised: Float32 | None


class Pipeline:
    """Everything that one bundle needs to answer requests, over whatever stages it is given.

    Args:
        bundle: folder with manifest.json and tokenizer/; the components are the stages' business.
        stages: the engine calls.
        limits: what is accepted; by default the model's own.
        policy: a name of `diffuserve.policies.POLICIES`.
        unet_instances: UNet calls in flight at once.
    """

    def __init__(
        self,
        bundle: Path,
        stages: Stages,
        limits: Limits | None = None,
        policy: str = "fair",
        unet_instances: int = 1,
    ) -> None:
        self.manifest = read_manifest(bundle)
        self.limits = limits or Limits.for_model(self.manifest.model)
        self._tokenizer = Tokenizer(bundle / "tokenizer", self.manifest.model.max_tokens)
        self._schedule = NoiseSchedule.from_config(self.manifest.scheduler)
        self._stages = stages
        self._embeddings = TextEmbeddings(self._tokenizer, stages)
        self._loop = InflightLoop(
            stages.denoise,
            max_rows=self.limits.max_rows,
            max_active_images=self.limits.max_active_images,
            policy=POLICIES[policy],
            instances=unet_instances,
        )
        # A pool of its own, so that encoding files never waits for, or delays, calls of the stages.
        self._encoders = ThreadPoolExecutor(2, thread_name_prefix="image encoder")
        self._waiting: set[asyncio.Queue[_Step | None]] = set()
        self._draining = False
        self.active = 0
        """Requests accepted and not yet answered."""

    @property
    def loop(self) -> InflightLoop:
        return self._loop

    @property
    def waiting(self) -> int:
        """Requests accepted whose first step is not done yet."""
        return len(self._waiting)

    def drain(self) -> None:
        """Refuses every request from now on; those accepted go on."""
        self._draining = True

    async def close(self) -> None:
        """Stops the loop; requests still in it fail."""
        await self._loop.close()
        self._encoders.shutdown()

    async def generate(self, request: TextToImageRequest) -> AsyncGenerator[Event, None]:
        """Yields `Accepted`, a `Progress` a step if the request asks for it, and `Completed`.

        Closing the iterator, or cancelling the task that reads it, frees the request's rows at the next step.

        Raises:
            Draining: the server is shutting down.
            QueueFull: too many requests wait already.
            DeadlineExceeded: the request's `timeout_ms` passed.
            StageFailed: an engine failed.
        """
        self._refuse_if_full()
        steps: asyncio.Queue[_Step | None] = asyncio.Queue()
        self._waiting.add(steps)
        self.active += 1
        drawing = asyncio.create_task(self._draw_in_time(request, steps))
        drawing.add_done_callback(lambda _: steps.put_nowait(None))
        try:
            yield Accepted(request.steps)
            while (step := await steps.get()) is not None:
                if request.progress:
                    yield Progress(step.step, request.steps, await self._previews(step))
            yield await drawing
        finally:
            drawing.cancel()
            await asyncio.gather(drawing, return_exceptions=True)
            self._waiting.discard(steps)
            self.active -= 1

    def _refuse_if_full(self) -> None:
        if self._draining:
            raise Draining(
                "The server is shutting down and takes no new requests. Send it to another one, or again later."
            )
        if len(self._waiting) >= self.limits.max_waiting_requests:
            rows_per_s = self._loop.rows_per_s
            retry_after_s = min(60.0, max(0.1, self._loop.rows_left / rows_per_s)) if rows_per_s else 1.0
            raise QueueFull(
                f"{len(self._waiting)} requests are waiting, and no more are queued. Try again in {retry_after_s:.1f} s.",
                retry_after_s,
            )

    async def _draw_in_time(self, request: TextToImageRequest, steps: asyncio.Queue[_Step | None]) -> Completed:
        timeout_s = request.timeout_ms / 1000 if request.timeout_ms else None
        try:
            return await asyncio.wait_for(self._draw(request, steps), timeout_s)
        except asyncio.TimeoutError:
            raise DeadlineExceeded(
                f"The request was not finished within its timeout_ms of {request.timeout_ms}. "
                "Allow more time, fewer steps or fewer images."
            ) from None

    async def _draw(self, request: TextToImageRequest, steps: asyncio.Queue[_Step | None]) -> Completed:
        arrival_s = time.monotonic()
        conditional, unconditional = await asyncio.gather(
            self._embeddings.get(request.prompt),
            self._embeddings.get(request.negative_prompt) if request.guided else _nothing(),
        )

        def on_step(step: int, denoised: Float32 | None) -> None:
            self._waiting.discard(steps)
            steps.put_nowait(_Step(step, denoised))

        model = self.manifest.model
        job = Job(
            trajectory=trajectory(self._schedule, request.sampler, request.steps),
            shape=(
                model.latent_channels,
                request.height // model.vae_scale_factor,
                request.width // model.vae_scale_factor,
            ),
            seeds=request.seeds,
            conditioning=conditional,
            unconditional=unconditional,
            guidance_scale=request.guidance_scale,
            priority=request.priority,
            arrival_s=arrival_s,
            preview_every=request.preview,
            on_step=on_step,
        )
        latents = await self._loop.denoise(job)
        pixels = await self._decode(latents, request)
        parameters = tuple(infotext(request, self.manifest, seed) for seed in request.seeds)
        images = await asyncio.gather(
            *(
                self._off_loop(encode_image, image, request.format, text)
                for image, text in zip(pixels, parameters, strict=True)
            )
        )
        first_step_s = job.first_step_s or arrival_s
        return Completed(
            images=tuple(images),
            pixels=pixels,
            seeds=request.seeds,
            parameters=parameters,
            warnings=self._warnings(request),
            queue_s=first_step_s - arrival_s,
            denoise_s=job.last_step_s - first_step_s,
            total_s=time.monotonic() - arrival_s,
        )

    async def _decode(self, latents: Float32, request: TextToImageRequest) -> NDArray[np.uint8]:
        """Returns (n, H, W, 3) uint8; raises StageFailed if the decoder returned anything else."""
        parts = np.split(latents, range(MAX_DECODE_BATCH, len(latents), MAX_DECODE_BATCH))
        decoded = await asyncio.gather(*(checked(VAE_DECODER, self._stages.decode(part)) for part in parts))
        for part, pixels in zip(parts, decoded, strict=True):
            expected = (len(part), request.height, request.width, 3)
            if pixels.shape != expected or pixels.dtype != np.uint8:
                raise StageFailed(
                    f"The VAE decoder returned {pixels.dtype} {pixels.shape} where uint8 {expected} was expected."
                )
        return np.concatenate(decoded)

    async def _previews(self, step: _Step) -> tuple[bytes, ...]:
        if step.denoised is None:
            return ()
        return tuple(await asyncio.gather(*(self._off_loop(self._preview, latents) for latents in step.denoised)))

    def _preview(self, latents: Float32) -> bytes:
        return encode_image(preview_from_latents(latents, self.manifest.preview), "png")

    def _off_loop(self, function: Callable[..., bytes], *args: object) -> asyncio.Future[bytes]:
        return asyncio.get_running_loop().run_in_executor(self._encoders, function, *args)

    def _warnings(self, request: TextToImageRequest) -> tuple[str, ...]:
        warnings = []
        texts = {"prompt": request.prompt, **({"negative_prompt": request.negative_prompt} if request.guided else {})}
        for name, text in texts.items():
            dropped = self._tokenizer.encode(text).dropped_text
            if dropped:
                warnings.append(
                    f"The {name} is longer than {self.manifest.model.max_tokens} tokens; this end of it was not used: {dropped!r}"
                )
        return tuple(warnings)


async def _nothing() -> None:
    return None
