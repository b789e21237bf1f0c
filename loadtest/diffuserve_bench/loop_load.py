"""Requests of a mixture as jobs of a loop in this process, where no server and no text stands before it."""

from __future__ import annotations

from diffuserve.inflight import Job
from diffuserve.samplers import NoiseSchedule, trajectory
from diffuserve.selection import LatentShape
from diffuserve.stages import Conditioning
from diffuserve_bench.mixture import GUIDANCE_SCALE, SAMPLER, Kind


def job_of(
    kind: Kind,
    seed: int,
    schedule: NoiseSchedule,
    shape: LatentShape,
    text: Conditioning,
    arrival_s: float,
) -> Job:
    """Args:
    kind: its steps and guidance are taken.
    seed: of the noise.
    schedule: the model's.
    shape: (C, h, w) of the latents.
    text: the embedded prompt, and negative prompt, without a batch dimension.
    arrival_s: on the loop's clock.
    """
    return Job(
        trajectory=trajectory(schedule, SAMPLER, kind.steps),
        shape=shape,
        seeds=[seed],
        conditioning=text,
        unconditional=text if kind.guided else None,
        guidance_scale=GUIDANCE_SCALE,
        priority=5,
        arrival_s=arrival_s,
    )
