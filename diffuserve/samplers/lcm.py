"""Sampling of latent consistency models, which predict the finished image at every step."""

from __future__ import annotations

import math

import numpy as np

from diffuserve.errors import InvalidRequest
from diffuserve.samplers.latents import preserving, x0_and_eps
from diffuserve.samplers.matrices import Evaluation, Trajectory, basis, trajectory_from_evaluations
from diffuserve.samplers.noise_schedule import NoiseSchedule

_SIGMA_DATA = 0.5  # the data's standard deviation, a constant in LCMScheduler too


def lcm(schedule: NoiseSchedule, steps: int, start: int) -> Trajectory:
    """Song et al., arXiv:2303.01469, algorithm 1, on latents: predict the image, noise it to the next timestep, again.

    The boundary conditions (eq. 5 there) make the prediction at t = 0 the latents themselves. Matches LCMScheduler (Luo
    et al., arXiv:2310.04378): its timesteps are some of the `original_inference_steps` that the model was
    distilled at, and the checkpoint's timestep_spacing does not matter.
    """
    timesteps = _timesteps(schedule, steps)
    x, output, noise = basis(1)
    evaluations = []
    for i, t in enumerate(timesteps[start:], start):
        alpha_cumprod = float(schedule.alphas_cumprod[t])
        x0 = x0_and_eps(schedule, alpha_cumprod, x, output)[0]
        scaled = t * schedule.timestep_scaling
        c_skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
        c_out = scaled / math.sqrt(scaled**2 + _SIGMA_DATA**2)
        denoised = c_out * x0 + c_skip * x
        following = denoised
        if i < steps - 1:
            to = float(schedule.alphas_cumprod[timesteps[i + 1]])
            following = math.sqrt(to) * denoised + math.sqrt(1 - to) * noise
        evaluations.append(Evaluation(t, [following], denoised, preserving(alpha_cumprod)))
    return trajectory_from_evaluations("lcm", evaluations)


def _timesteps(schedule: NoiseSchedule, steps: int) -> list[int]:
    """Falling: of the timesteps k - 1, 2 k - 1 .. that the model was distilled at, `steps` at even distances."""
    total, original = schedule.num_train_timesteps, schedule.original_inference_steps
    if original > total:
        raise InvalidRequest(
            f"sampler is 'lcm', and this checkpoint's scheduler config has original_inference_steps={original} of "
            f"num_train_timesteps={total}. Use another sampler, or fix the config and export the checkpoint again."
        )
    if steps > original:
        raise InvalidRequest(
            f"steps is {steps}; with the sampler lcm it must be 1 to {original}, the original_inference_steps of the "
            "checkpoint's scheduler config. Ask for fewer; 4 to 8 are usual."
        )
    distilled = (np.arange(original, 0, -1) * (total // original) - 1).tolist()
    return [distilled[math.floor(index)] for index in np.linspace(0, original, steps, endpoint=False)]
