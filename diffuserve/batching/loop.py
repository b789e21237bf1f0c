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

The loop knows no server, no engine and no array. It is given one coroutine function, the UNet call, and the arithmetic
around it, and runs on one event loop; a request is an asyncio task that awaits `denoise`, so cancelling the task, by
whatever client or deadline, takes its rows out at the next step.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable

import numpy as np

from diffuserve.batching.arithmetic import Advanced, Arithmetic
from diffuserve.batching.jobs import Job, Latent
from diffuserve.batching.numpy_arithmetic import NumpyArithmetic
from diffuserve.batching.selection import Selection
from diffuserve.errors import StageFailed
from diffuserve.samplers import initial_state
from diffuserve.samplers.noise import Generator
from diffuserve.stages import Array, Conditioning
from diffuserve.stats import Stats

log = logging.getLogger(__name__)

Denoise = Callable[[Array, Array, Conditioning], Awaitable[Array]]


class InflightLoop:
    """Owns the active latents and advances them, one UNet call after another (one in flight for each instance).

    Args:
        denoise: the UNet call, `StageCalls.denoise`, which gives up a call that hangs.
        selection: what goes into each call.
        arithmetic: what a step computes besides the UNet, where that takes its inputs.
        max_active_images: images with latents, running or paused; jobs beyond it wait.
        instances: UNet calls in flight at once, one for each instance of the model.
        stats: where calls and their rows are counted.
        on_call: called after each UNet call that gave something, with the number of latent values in it and its seconds.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        denoise: Denoise,
        selection: Selection,
        *,
        arithmetic: Arithmetic | None = None,
        max_active_images: int,
        instances: int = 1,
        stats: Stats | None = None,
        on_call: Callable[[int, float], None] = lambda size, seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._denoise = denoise
        self._selection = selection
        self._arithmetic = arithmetic or NumpyArithmetic()
        self._max_active_images = max_active_images
        self._idle_instances = instances
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

    async def denoise(self, job: Job) -> Array:
        """Takes a job through all its steps; cancelling this call takes it out at the next one.

        Returns:
            (n, C, h, w) float32: the finished latents, unit variance, where the loop's arithmetic is.

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
            job.conditioning = self._placed(job.conditioning)
            job.unconditional = None if job.unconditional is None else self._placed(job.unconditional)
            for seed in job.seeds:
                generator = Generator(seed)
                state = self._arithmetic.place(initial_state(generator.randn(job.shape), job.trajectory))
                job.latents.append(Latent(job, state, generator))
            self._active.append(job)
            job.admitted_s = now_s
            self._stats.observe("queue_seconds", now_s - job.arrival_s)
            room -= len(job.seeds)

    def _placed(self, conditioning: Conditioning) -> Conditioning:
        return {name: self._arithmetic.place(array) for name, array in conditioning.items()}

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
            step = self._arithmetic.step(batch)
            output = await self._denoise(*step.unet_inputs())
            _check(batch, output)
            self._note(batch, await step.advance(output))
            self._on_call(math.prod(output.shape), self._clock() - started_s)
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

    def _note(self, batch: list[Latent], advanced: list[Advanced | None]) -> None:
        """Takes over what has become of the latents, and completes the jobs that are done."""
        now_s = self._clock()
        for latent, result in zip(batch, advanced, strict=True):
            job = latent.job
            if result is None:
                _fail(
                    job, StageFailed("The UNet returned values that are not finite, so this image cannot be finished.")
                )
                continue
            latent.denoised = latent.denoised if result.denoised is None else result.denoised
            latent.state = result.state
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
            job.done.set_result(self._arithmetic.latents([latent.state for latent in job.latents]))

    def _fail_all(self, batch: list[Latent], error: StageFailed) -> None:
        # An exception each: awaiting one adds to its traceback, which would tie the requests' frames together.
        for job in dict.fromkeys(latent.job for latent in batch):
            _fail(job, StageFailed(str(error)))


def _check(batch: list[Latent], output: Array) -> None:
    """Raises StageFailed if the UNet's output is not one float32 prediction for each row."""
    expected = (sum(latent.rows for latent in batch), *batch[0].job.shape)
    shape, dtype = tuple(output.shape), str(output.dtype).rpartition(".")[2]
    if shape != expected or dtype != "float32":
        raise StageFailed(f"The UNet returned {dtype} {shape} where float32 {expected} was expected.")


def _fail(job: Job, error: StageFailed) -> None:
    if not job.done.done():
        job.done.set_exception(error)
