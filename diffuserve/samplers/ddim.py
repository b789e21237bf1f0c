"""DDIM, on which PNDM builds."""

from __future__ import annotations

import math

import numpy as np

from diffuserve.samplers.latents import preserving, x0_and_eps
from diffuserve.samplers.matrices import Evaluation, Row, Trajectory, basis, trajectory_from_evaluations
from diffuserve.samplers.noise_schedule import NoiseSchedule


def ddim_step(schedule: NoiseSchedule, alpha_cumprod: float, to: float, x: Row, output: Row) -> Row:
    """Song et al., arXiv:2010.02502, eq. 12 with eta = 0: jump to the predicted image, put back less of the noise.

    Args:
        alpha_cumprod, to: alpha_t^2 of `x` and of the result.
    """
    x0, eps = x0_and_eps(schedule, alpha_cumprod, x, output)
    return math.sqrt(to) * x0 + math.sqrt(1 - to) * eps


def ddim(schedule: NoiseSchedule, steps: int, start: int) -> Trajectory:
    """Matches DDIMScheduler, which measures the jump in training's timesteps rather than to the next of its own."""
    timesteps = schedule.inference_timesteps(steps, default_spacing="leading").round().astype(np.int64)
    x, output, _noise = basis(1)
    evaluations = []
    for t in timesteps[start:].tolist():
        alpha_cumprod = schedule.alpha_cumprod_at(t, default_set_alpha_to_one=True)
        to = schedule.alpha_cumprod_at(t - schedule.num_train_timesteps // steps, default_set_alpha_to_one=True)
        following = ddim_step(schedule, alpha_cumprod, to, x, output)
        x0, _eps = x0_and_eps(schedule, alpha_cumprod, x, output)
        evaluations.append(Evaluation(t, [following], x0, preserving(alpha_cumprod)))
    return trajectory_from_evaluations("ddim", evaluations)
