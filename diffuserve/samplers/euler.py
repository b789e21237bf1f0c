"""Samplers that follow dx/dsigma, on variance-exploding latents: x = x0 + sigma eps."""

from __future__ import annotations

import math
from itertools import pairwise

from diffuserve.samplers.latents import alpha_at_sigma, initial_sigma, refuse_zero_snr, with_final, x0_at_sigma
from diffuserve.samplers.matrices import Evaluation, Trajectory, basis, trajectory_from_evaluations
from diffuserve.samplers.noise_schedule import NoiseSchedule


def euler(schedule: NoiseSchedule, steps: int, start: int) -> Trajectory:
    """Karras et al., arXiv:2206.00364, algorithm 1 without its second-order correction: follow dx/dsigma to the next.

    Matches EulerDiscreteScheduler: latents of variance 1 + sigma^2, scaled for the UNet, at fractional timesteps.
    """
    timesteps = schedule.inference_timesteps(steps, default_spacing="linspace")
    sigmas = with_final(schedule, schedule.sigma_at(timesteps), schedule.final_sigmas_type)
    x, output, _noise = basis(1)
    evaluations = []
    for t, (sigma, to) in zip(timesteps[start:], pairwise(sigmas[start:]), strict=True):
        x0 = x0_at_sigma(schedule, sigma, x, output)
        slope = (x - x0) / sigma
        evaluations.append(Evaluation(t, [x + slope * (to - sigma)], x0, (1, sigma), alpha_at_sigma(sigma)))
    return trajectory_from_evaluations("euler", evaluations, initial_sigma(schedule, sigmas))


def euler_a(schedule: NoiseSchedule, steps: int, start: int) -> Trajectory:
    """Euler, but each step goes further down than the next sigma, to sigma_down, and climbs back with fresh noise.

    From k-diffusion's `sample_euler_ancestral`; matches EulerAncestralDiscreteScheduler. `up` is the standard deviation
    of DDPM's posterior (arXiv:2006.11239, eq. 7, in terms of sigma), and down^2 + up^2 = to^2 leaves to^2 / sigma.
    """
    timesteps = schedule.inference_timesteps(steps, default_spacing="linspace")
    sigmas = with_final(schedule, schedule.sigma_at(timesteps), "zero")
    x, output, noise = basis(1)
    evaluations = []
    for t, (sigma, to) in zip(timesteps[start:], pairwise(sigmas[start:]), strict=True):
        down = to**2 / sigma
        up = to * math.sqrt(max(0.0, 1 - (to / sigma) ** 2))  # rescaled linear betas make sigmas rise at the top
        x0 = x0_at_sigma(schedule, sigma, x, output)
        slope = (x - x0) / sigma
        following = x + slope * (down - sigma) + up * noise
        evaluations.append(Evaluation(t, [following], x0, (1, sigma), alpha_at_sigma(sigma)))
    return trajectory_from_evaluations("euler_a", evaluations, initial_sigma(schedule, sigmas))


def heun(schedule: NoiseSchedule, steps: int, start: int) -> Trajectory:
    """Karras et al., arXiv:2206.00364, algorithm 1: Euler, then again with the mean of the slopes at both ends.

    Matches HeunDiscreteScheduler: two evaluations per step, and one for the last, since there is no slope at sigma = 0.
    """
    refuse_zero_snr("heun", schedule)
    timesteps = schedule.inference_timesteps(steps, default_spacing="linspace")
    sigmas = with_final(schedule, schedule.sigma_at(timesteps), "zero")
    x, halfway, output, _noise = basis(2)  # halfway: where half of the first slope leads
    evaluations = []
    for i, (sigma, to) in enumerate(pairwise(sigmas[start:]), start):
        x0 = x0_at_sigma(schedule, sigma, x, output)
        step = (x - x0) / sigma * (to - sigma)
        last = i == steps - 1
        state = [x + step, x + step / 2]
        evaluations.append(Evaluation(timesteps[i], state, x0, (1, sigma), alpha_at_sigma(sigma), last))
        if not last:
            x0 = x0_at_sigma(schedule, to, x, output)
            step = (x - x0) / to * (to - sigma)
            state = [halfway + step / 2]
            evaluations.append(Evaluation(timesteps[i + 1], state, x0, (1, to), alpha_at_sigma(to)))
    return trajectory_from_evaluations("heun", evaluations, initial_sigma(schedule, sigmas))
