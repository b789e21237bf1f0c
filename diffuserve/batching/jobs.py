"""A request's part in the loop, and its images while they are being denoised."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from diffuserve.samplers import Trajectory
from diffuserve.samplers.noise import Generator
from diffuserve.stages import Array, Conditioning, Float32

LatentShape = tuple[int, int, int]


class BatchKey(NamedTuple):
    """What rows must agree on to share a UNet call. Jobs of the same key share calls; whatever else a call has for all of
    its rows, rather than for each, becomes a part of it.

    latent: (C, h, w). Rows are stacked into one array, and a smaller image cannot be padded: the UNet's convolutions and
        attention would see the padding.
    conditioning: name and shape, without the batch dimension, of every other input, in order of their names. A shorter
        prompt is not padded to a longer one's tokens, since attention over the padding would make its image depend on its
        batch. By name, so that a row that lacks an optional input never shares a call with one that has it.
    """

    latent: LatentShape
    conditioning: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(eq=False)
class Latent:
    """One image of a job while it is being denoised.

    `state`: (K, C, h, w) float32, the sampler's state, of which slot 0 is the latents, where the loop's arithmetic is;
    `position`: evaluations done; `running`: whether a UNet call has it now; `denoised`: (C, h, w) float32, the estimate of
    the finished latents at the last step that the job wants previews of.
    """

    job: Job
    state: Array
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

    @property
    def wants_preview(self) -> bool:
        """Of the step that the next evaluation belongs to."""
        return self.job.wants_preview(int(self.job.trajectory.steps_done[self.position]))


@dataclass(eq=False)
class Job:
    """One request's part in the loop: `len(seeds)` images that share everything but their noise.

    Attributes:
        trajectory: the sampler's coefficients for every UNet evaluation.
        shape: (C, h, w) of each latent.
        seeds: one per image, for a noise generator of its own.
        conditioning: the prompt's embedding, arrays without a batch dimension by UNet input name. When the loop admits the
            job it puts them where its arithmetic is.
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

    # Kept by the loop: its latents once it is admitted, then its result; when it was admitted, and when its first and latest
    # steps were done, on the loop's clock.
    latents: list[Latent] = field(default_factory=list, init=False)
    done: asyncio.Future[Array] = field(default_factory=lambda: asyncio.get_running_loop().create_future(), init=False)
    rows_done: int = field(default=0, init=False)
    steps_done: int = field(default=0, init=False)
    admitted_s: float | None = field(default=None, init=False)
    first_step_s: float | None = field(default=None, init=False)
    last_step_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.last_step_s = self.arrival_s

    @cached_property
    def batch_key(self) -> BatchKey:
        return BatchKey(self.shape, tuple(sorted((name, array.shape) for name, array in self.conditioning.items())))

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
