"""DPM-Solver++ and UniPC: exact for the linear part, with the predicted image extrapolated from the last ones.

In the papers' terms lambda = -log sigma, a step is h = log(sigma / to), and e^-h = to / sigma, which stays finite at
the last step, where to = 0.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffuserve.errors import InvalidRequest
from diffuserve.samplers.latents import alpha_at_sigma, preserving, with_final, x0_and_eps
from diffuserve.samplers.matrices import Evaluation, Trajectory, basis, trajectory_from_evaluations
from diffuserve.samplers.noise_schedule import NoiseSchedule


def dpmpp_2m(schedule: NoiseSchedule, steps: int, start: int) -> Trajectory:
    """DPM-Solver++(2M) at the checkpoint's timestep spacing."""
    return _dpmpp("dpmpp_2m", schedule, *_spaced(schedule, steps), start)


def dpmpp_2m_karras(schedule: NoiseSchedule, steps: int, start: int) -> Trajectory:
    """DPM-Solver++(2M) at Karras et al.'s sigmas: `use_karras_sigmas=True`."""
    return _dpmpp("dpmpp_2m_karras", schedule, *_karras(schedule, steps), start)


def dpmpp_2m_sde(schedule: NoiseSchedule, steps: int, start: int) -> Trajectory:
    """SDE-DPM-Solver++(2M) at the checkpoint's timestep spacing."""
    return _dpmpp("dpmpp_2m_sde", schedule, *_spaced(schedule, steps), start, stochastic=True)


def dpmpp_2m_sde_karras(schedule: NoiseSchedule, steps: int, start: int) -> Trajectory:
    """SDE-DPM-Solver++(2M) at Karras et al.'s sigmas: `use_karras_sigmas=True`."""
    return _dpmpp("dpmpp_2m_sde_karras", schedule, *_karras(schedule, steps), start, stochastic=True)


def _spaced(schedule: NoiseSchedule, steps: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sigmas and timesteps, (steps,) float64 each, falling."""
    # linspace and leading divide the range by steps + 1: there is always one more point, at the low end, left out.
    timesteps = schedule.inference_timesteps(steps, default_spacing="linspace", points=steps + 1).round()
    return schedule.sigma_at(timesteps), timesteps


def _karras(schedule: NoiseSchedule, steps: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    sigmas = schedule.karras_sigmas(steps)
    timesteps = schedule.timestep_at(sigmas)
    timesteps[0] = schedule.num_train_timesteps - 1  # the top of the range, which rounding in the powers may miss
    # diffusers truncates for cosine betas and rounds for the others; the UNet is told the timestep, so it matters.
    return sigmas, np.trunc(timesteps) if schedule.beta_schedule == "squaredcos_cap_v2" else timesteps.round()


def _dpmpp(
    sampler: str,
    schedule: NoiseSchedule,
    sigmas: NDArray[np.float64],
    timesteps: NDArray[Any],
    start: int,
    *,
    stochastic: bool = False,
) -> Trajectory:
    """Lu et al., arXiv:2211.01095, algorithm 2, and its SDE: exact for the linear part, x0 extrapolated from the last.

    The SDE's step keeps the square of what the other's keeps of the latents, and makes up for it with fresh noise.
    Matches DPMSolverMultistepScheduler (dpmsolver++ and sde-dpmsolver++, order 2, midpoint).
    """
    sigmas = with_final(schedule, sigmas, schedule.final_sigmas_type)
    steps = len(timesteps)
    last_is_first_order = (
        schedule.euler_at_final
        or (schedule.lower_order_final and steps < 15)
        or schedule.final_sigmas_type == "zero"  # where h, and with it the extrapolation, is infinite
    )
    x, last, output, noise = basis(2)  # last: the image predicted at the last step
    evaluations = []
    for i, (sigma, to) in enumerate(pairwise(sigmas[start:]), start):
        alpha, alpha_to = alpha_at_sigma(sigma), alpha_at_sigma(to)
        x0, _eps = x0_and_eps(schedule, alpha**2, x, output)
        estimate = x0
        if i > start and not (i == steps - 1 and last_is_first_order):
            estimate = x0 + 0.5 * _reach(sigmas[i - 1], sigma, to) * (x0 - last)
        decay = (to / sigma) ** (2 if stochastic else 1)
        x_to = alpha_to * (decay / alpha * x + (1 - decay) * estimate)
        if stochastic:
            x_to += alpha_to * to * math.sqrt(max(0.0, 1 - decay)) * noise  # sigmas may rise, as in euler_a
        evaluations.append(Evaluation(timesteps[i], [x_to, x0], x0, preserving(alpha**2)))
    return trajectory_from_evaluations(sampler, evaluations)


def unipc(schedule: NoiseSchedule, steps: int, start: int) -> Trajectory:
    """Zhao et al., arXiv:2302.04867: the predictor UniP and the corrector UniC, both of order 2, for data prediction.

    UniP's step is that of DPM-Solver++(2M). Once the UNet's output at its end is known, UniC makes the same step again
    with it, and the next starts from there. Matches UniPCMultistepScheduler (predict_x0, solver_type bh1 or bh2).

    Raises:
        InvalidRequest: the checkpoint's settings make the last step infinite.
    """
    if steps > 1 and not schedule.lower_order_final and schedule.final_sigmas_type == "zero":
        raise InvalidRequest(
            "sampler is 'unipc', and this checkpoint's scheduler config has lower_order_final=false and "
            "final_sigmas_type='zero': its last step would be infinite. Use another sampler, such as dpmpp_2m."
        )
    sigmas, timesteps = _spaced(schedule, steps)
    sigmas = with_final(schedule, sigmas, schedule.final_sigmas_type)
    x, last, before, output, _noise = basis(3)  # last, before: the images predicted at the last step and before that
    evaluations = []
    order = 0  # of the step that led here
    for i, (sigma, to) in enumerate(pairwise(sigmas[start:]), start):
        alpha, alpha_to = alpha_at_sigma(sigma), alpha_at_sigma(to)
        x0, _eps = x0_and_eps(schedule, alpha**2, x, output)
        # The corrected step has the same start as the predicted one, so what UniC changes is the extrapolation alone.
        corrected = x
        if order:
            h = math.log(sigmas[i - 1] / sigma)
            correction = 0.5 * (x0 - last)
            if order == 2:
                reach = _reach(sigmas[i - 2], sigmas[i - 1], sigma)
                b_1, b_2 = _unic_equations(schedule, h)
                rho = (b_1 - b_2) / (1 + 1 / reach)  # from rho + rho_2 = b_1 and rho_2 - rho / reach = b_2
                correction = (rho - 0.5) * reach * (last - before) + (b_1 - rho) * (x0 - last)
            corrected = x - alpha * _b(schedule, h) * correction
        order = 1 if i == start or (i == steps - 1 and schedule.lower_order_final) else 2
        x_to = alpha_to * (to / (sigma * alpha) * corrected + (1 - to / sigma) * x0)
        if order == 2:
            b_h = _b(schedule, math.log(sigma / to))
            x_to -= alpha_to * b_h * 0.5 * _reach(sigmas[i - 1], sigma, to) * (x0 - last)
        evaluations.append(Evaluation(timesteps[i], [x_to, x0, last], x0, preserving(alpha**2)))
    return trajectory_from_evaluations("unipc", evaluations)


def _reach(before: float, sigma: float, to: float) -> float:
    """How far this step extrapolates, in lengths of the one before: both in lambda."""
    return math.log(sigma / to) / math.log(before / sigma)


def _b(schedule: NoiseSchedule, h: float) -> float:
    """UniPC's B(h), by `solver_type`."""
    return -h if schedule.solver_type == "bh1" else math.expm1(-h)


def _unic_equations(schedule: NoiseSchedule, h: float) -> tuple[float, float]:
    """b_1 and b_2, the right-hand side of the equations for UniC-2's weights: `multistep_uni_c_bh_update`."""
    phi = math.expm1(-h) / -h - 1
    return phi / _b(schedule, h), 2 * (phi / -h - 0.5) / _b(schedule, h)
