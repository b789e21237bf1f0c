"""The step-level batching loop: requests join and leave the running batch at every denoising step.

Language-model servers batch at the level of one token (Yu et al., Orca, OSDI 2022: iteration-level scheduling). A
diffusion step is the same kind of thing: one UNet call whose rows need not agree on anything but their shapes, of the
latent and of the embedded prompt. Timestep, sampler, guidance and prompt are per row, so requests of any mixture share
the call.

    request --denoise(job)--> waiting --admit--> active --select--> UNet call --advance--> active ... --> latents
                              (no memory)        (a latent each,                (each row by its
                                                  running or paused)             own matrix)

The active set and the batch of a step are different things. A paused latent costs kilobytes, so many more may be active
than fit into a call, and every step selects anew: no request waits for another's last step.

The loop knows no server and no engine. It is given one coroutine function, the UNet call, and runs on one event loop; a
request is an asyncio task that awaits `denoise`, so cancelling the task, by whatever client or deadline, takes its
rows out at the next step.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from diffuserve.errors import StageFailed
from diffuserve.noise import Generator
from diffuserve.samplers import Trajectory, advance, initial_state
from diffuserve.selection import LatentShape, RowShapes, Selection
from diffuserve.stages import CALL_TIMEOUT_S, Conditioning, Float32, checked
from diffuserve.stats import Stats
from diffuserve.tensors import UNET

log = logging.getLogger(__name__)

Denoise = Callable[[Float32, Float32, Conditioning], Awaitable[Float32]]


@dataclass(eq=False)
class Latent:
    """One image of a job while it is being denoised.

    `state`: (K, C, h, w) float32, the sampler's state, of which slot 0 is the latents; `position`: evaluations done;
    `running`: whether a UNet call has it now; `denoised`: (C, h, w) float32, the estimate of the finished latents at the
    last step that the job wants previews of.
    """

    job: Job
    state: Float32
    generator: Generator
    position: int = 0
    running: bool = False
    denoised: Float32 | None = None

    @property
    def rows(self) -> int:
        """UNet rows that it takes in a call."""
        return self.job.rows_per_image

    @property
    def finished(self) -> bool:
        return self.position == self.job.trajectory.evaluations


@dataclass(eq=False)
class Job:
    """One request's part in the loop: `len(seeds)` images that share everything but their noise.

    Attributes:
        trajectory: the sampler's coefficients for every UNet evaluation.
        shape: (C, h, w) of each latent.
        seeds: one an image, for a noise generator of its own.
        conditioning: the prompt's embedding, arrays without a batch dimension by UNet input name.
        unconditional: the same for the negative prompt, of the same shapes, or None for no guidance; with it an image
            takes two rows.
        guidance_scale: weight of the difference between the two predictions; ignored without `unconditional`.
        priority: 0 (first) .. 9 (last).
        arrival_s: on the loop's clock.
        client_id: whose request it is, for fair shares among clients; requests without one share the empty one.
        preview_every: estimate the finished latents at every k-th step; 0 means never.
        on_step: called after each sampling step that all images of the job have done, with the number of steps done and,
            at every `preview_every`-th, the images' estimates of the finished latents, (n, C, h, w) float32.
    """

    trajectory: Trajectory
    shape: LatentShape
    seeds: Sequence[int]
    conditioning: Conditioning
    unconditional: Conditioning | None
    guidance_scale: float
    priority: int
    arrival_s: float
    client_id: str = ""
    preview_every: int = 0
    on_step: Callable[[int, Float32 | None], None] = lambda step, denoised: None

    latents: list[Latent] = field(default_factory=list, init=False)
    done: asyncio.Future[Float32] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future(), init=False
    )
    rows_done: int = field(default=0, init=False)
    steps_done: int = field(default=0, init=False)
    first_step_s: float | None = field(default=None, init=False)
    last_step_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.last_step_s = self.arrival_s

    @cached_property
    def row_shapes(self) -> RowShapes:
        """What rows must agree on to share a UNet call: the shapes of the latent and of all conditioning. Prompts of
        different lengths are not padded to share one, since padding would change the image."""
        return (self.shape, *(self.conditioning[name].shape for name in sorted(self.conditioning)))

    @property
    def rows_per_image(self) -> int:
        return 1 if self.unconditional is None else 2

    @property
    def rows_total(self) -> int:
        """UNet rows from the first evaluation to the last, over all images."""
        return self.trajectory.evaluations * self.rows_per_image * len(self.seeds)

    @property
    def rows_left(self) -> int:
        return self.rows_total - self.rows_done

    def ready_latents(self) -> list[Latent]:
        """Those that a call may take: admitted, not in a call and not finished."""
        if self.done.done():
            return []
        return [latent for latent in self.latents if not (latent.running or latent.finished)]

    def wants_preview(self, step: int) -> bool:
        return self.preview_every > 0 and step % self.preview_every == 0


class InflightLoop:
    """Owns the active latents and advances them, one UNet call after another (one in flight for each instance).

    Args:
        denoise: the UNet call, as in `Stages.denoise`.
        selection: what goes into each call.
        max_active_images: images with latents, running or paused; jobs beyond it wait.
        instances: UNet calls in flight at once, one for each instance of the model.
        call_timeout_s: seconds after which a UNet call counts as hung; its jobs fail and the loop goes on.
        stats: where calls and their rows are counted.
        on_call: called after each UNet call that gave something, with the number of latent values in it and its seconds.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        denoise: Denoise,
        selection: Selection,
        *,
        max_active_images: int,
        instances: int = 1,
        call_timeout_s: float = CALL_TIMEOUT_S,
        stats: Stats | None = None,
        on_call: Callable[[int, float], None] = lambda size, seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._denoise = denoise
        self._selection = selection
        self._max_active_images = max_active_images
        self._idle_instances = instances
        self._call_timeout_s = call_timeout_s
        self._clock = clock
        self._waiting: list[Job] = []
        self._active: list[Job] = []
        self._wake = asyncio.Event()
        self._calls: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None
        self._stats = stats or Stats()
        self._on_call = on_call
        self._rows_per_s = 0.0

    # -- for requests ------------------------------------------------------------------------------------------------

    async def denoise(self, job: Job) -> Float32:
        """Takes a job through all its steps; cancelling this call takes it out at the next one.

        Returns:
            (n, C, h, w) float32: the finished latents, unit variance.

        Raises:
            StageFailed: a UNet call that carried one of its images failed, or the loop itself died.
        """
        if job.rows_per_image > self._selection.max_rows:
            raise StageFailed("An image with guidance takes two UNet rows, and max_rows is 1. Set it to 2 or more.")
        self._waiting.append(job)
        self._wake.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="inflight loop")
        try:
            return await job.done
        finally:
            self._discard(job)

    @property
    def images_active(self) -> int:
        return sum(len(job.latents) for job in self._active)

    @property
    def rows_left(self) -> int:
        """UNet rows that everything waiting and active still needs."""
        return sum(job.rows_left for job in self._waiting) + sum(job.rows_left for job in self._active)

    @property
    def rows_per_s(self) -> float:
        """The speed of late, 0 before the first call."""
        return self._rows_per_s

    async def close(self) -> None:
        """Stops the loop and the calls in flight; jobs still in it fail."""
        tasks = [*self._calls, *([self._task] if self._task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- the loop ----------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        """Runs while there is anything to do; the next request starts it again, also after it has died."""
        try:
            while self._waiting or self._active or self._calls:
                self._admit()
                while self._idle_instances and (batch := self._selection.select(self._active, self._clock())):
                    self._start_call(batch)
                await self._wake.wait()
                self._wake.clear()
        except Exception:
            log.exception("the in-flight loop died; the next request starts it again")
        finally:
            for job in [*self._waiting, *self._active]:
                _fail(job, StageFailed("The in-flight loop has stopped; the server's log says why."))

    def _discard(self, job: Job) -> None:
        """Forgets a job that is finished, failed or cancelled. A call in flight keeps its own references."""
        for jobs in (self._waiting, self._active):
            if job in jobs:
                jobs.remove(job)
        self._wake.set()

    def _admit(self) -> None:
        """Gives latents to waiting jobs, the most urgent first, while there is room. A job is admitted whole; one that
        is larger than the room alone is admitted when nothing else is active."""
        now_s = self._clock()
        self._waiting = self._selection.order(self._waiting, now_s)
        room = self._max_active_images - self.images_active
        while self._waiting and (len(self._waiting[0].seeds) <= room or not self._active):
            job = self._waiting.pop(0)
            for seed in job.seeds:
                generator = Generator(seed)
                job.latents.append(Latent(job, initial_state(generator.randn(job.shape), job.trajectory), generator))
            self._active.append(job)
            self._stats.observe("queue_seconds", now_s - job.arrival_s)
            room -= len(job.seeds)

    def _start_call(self, batch: list[Latent]) -> None:
        for latent in batch:
            latent.running = True
        self._stats.count("unet_rows_shareable", min(self._selection.max_rows, self._selection.ready_rows))
        self._idle_instances -= 1
        task = asyncio.create_task(self._call(batch), name="unet call")
        self._calls.add(task)

    async def _call(self, batch: list[Latent]) -> None:
        """One UNet call and the sampler's update of its latents. A failure fails the jobs in it and no others."""
        started_s = self._clock()
        try:
            output = await checked(UNET, self._denoise(*_unet_inputs(batch)), self._call_timeout_s)
            self._advance(batch, output)
            self._on_call(output.size, self._clock() - started_s)
        except StageFailed as error:
            self._fail_all(batch, error)
        except Exception as error:
            log.exception("a UNet call could not be made or used")
            self._fail_all(batch, StageFailed(f"The step failed: {error!r}"))
        finally:
            self._account(batch, self._clock() - started_s)
            self._idle_instances += 1
            self._calls = {task for task in self._calls if task is not asyncio.current_task()}
            self._wake.set()

    def _account(self, batch: list[Latent], call_s: float) -> None:
        rows = sum(latent.rows for latent in batch)
        for latent in batch:
            latent.running = False
        self._selection.account(batch, call_s)
        speed = rows / max(call_s, 1e-9)
        self._rows_per_s = speed if not self._rows_per_s else 0.9 * self._rows_per_s + 0.1 * speed
        self._stats.count("unet_calls")
        self._stats.count("unet_rows", rows)
        self._stats.observe("unet_call_rows", rows)
        self._stats.observe("unet_call_seconds", call_s)

    def _advance(self, batch: list[Latent], output: Float32) -> None:
        """Applies guidance and each latent's own sampler to all of them at once, and completes the jobs that are done.

        Args:
            output: (rows, C, h, w) float32: a prediction for each latent, then those of the negative prompts.

        Raises:
            StageFailed: the output's shape or dtype is not the sample's.
        """
        rows = sum(latent.rows for latent in batch)
        expected = (rows, *batch[0].job.shape)
        if output.shape != expected or output.dtype != np.float32:
            raise StageFailed(f"The UNet returned {output.dtype} {output.shape} where float32 {expected} was expected.")
        with np.errstate(all="ignore"):  # values that are not finite are found below, and fail their own request only
            prediction = _guided(batch, output)
        positions = [(latent, latent.job.trajectory, latent.position) for latent in batch]
        noise = np.zeros_like(prediction)
        for row, (latent, trajectory, position) in enumerate(positions):
            if trajectory.draws_noise[position]:
                noise[row] = latent.generator.randn(latent.job.shape)
        states = [latent.state for latent in batch]
        updates = [trajectory.update[position] for _, trajectory, position in positions]
        with np.errstate(all="ignore"):
            advanced = advance(states, prediction, noise, updates)

        now_s = self._clock()
        for row, (latent, trajectory, position) in enumerate(positions):
            job = latent.job
            if not np.isfinite(advanced[row]).all():
                _fail(
                    job, StageFailed("The UNet returned values that are not finite, so this image cannot be finished.")
                )
                continue
            step = int(trajectory.steps_done[position])
            if job.wants_preview(step):
                of_latents, of_output = trajectory.denoised[position]
                latent.denoised = of_latents * latent.state[0] + of_output * prediction[row]
            latent.state = advanced[row]
            latent.position += 1
            job.rows_done += job.rows_per_image
            job.first_step_s = job.first_step_s if job.first_step_s is not None else now_s
            job.last_step_s = now_s
        for job in dict.fromkeys(latent.job for latent in batch):
            if not job.done.done():
                self._report(job)

    def _report(self, job: Job) -> None:
        """Tells the job's owner of a step that all its images have done, and of its end."""
        steps_done = min(
            int(job.trajectory.steps_done[latent.position - 1]) if latent.position else 0 for latent in job.latents
        )
        if steps_done > job.steps_done:
            job.steps_done = steps_done
            estimates = [latent.denoised for latent in job.latents if latent.denoised is not None]
            job.on_step(steps_done, np.stack(estimates) if job.wants_preview(steps_done) else None)
        if all(latent.finished for latent in job.latents):
            job.done.set_result(np.stack([latent.state[0] for latent in job.latents]))

    def _fail_all(self, batch: list[Latent], error: StageFailed) -> None:
        # An exception each: awaiting one adds to its traceback, which would tie the requests' frames together.
        for job in dict.fromkeys(latent.job for latent in batch):
            _fail(job, StageFailed(str(error)))


def _fail(job: Job, error: StageFailed) -> None:
    if not job.done.done():
        job.done.set_exception(error)


def _unet_inputs(batch: list[Latent]) -> tuple[Float32, Float32, Conditioning]:
    """Stacks a batch for the UNet: a row for each latent, then one more for each that has guidance."""
    guided = [row for row, latent in enumerate(batch) if latent.job.unconditional is not None]
    sample = np.stack([latent.state[0] * latent.job.trajectory.input_scale[latent.position] for latent in batch])
    timestep = np.array([latent.job.trajectory.timesteps[latent.position] for latent in batch], np.float32)
    rows = [latent.job.conditioning for latent in batch]
    rows += [embedding for row in guided if (embedding := batch[row].job.unconditional) is not None]
    conditioning = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return np.concatenate([sample, sample[guided]]), np.concatenate([timestep, timestep[guided]]), conditioning


def _guided(batch: list[Latent], output: Float32) -> Float32:
    """Classifier-free guidance (Ho and Salimans, arXiv:2207.12598) for the rows that have it.

    Args:
        output: (rows, C, h, w) float32 in the order of `_unet_inputs`.

    Returns:
        (len(batch), C, h, w) float32, a new array.
    """
    prediction = output[: len(batch)].copy()
    guided = [row for row, latent in enumerate(batch) if latent.job.unconditional is not None]
    if guided:
        scale = np.array([batch[row].job.guidance_scale for row in guided], np.float32)[:, None, None, None]
        unconditional = output[len(batch) :]
        prediction[guided] = unconditional + scale * (prediction[guided] - unconditional)
    return prediction
