"""What latents are made of, and what the UNet's output says about it: the formulas that the samplers share.

`x`, `output` and all results are rows of weights (`diffuserve.samplers.matrices.basis`); the same code computes with them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffuserve.errors import InvalidRequest
from diffuserve.samplers.matrices import Row
from diffuserve.samplers.noise_schedule import NoiseSchedule


def x0_and_eps(schedule: NoiseSchedule, alpha_cumprod: float, x: Row, output: Row) -> tuple[Row, Row]:
    """The image and the noise that the UNet's output says `x` is made of: x = alpha x0 + sigma eps.

    v = alpha eps - sigma x0 (Salimans and Ho, arXiv:2202.00512, section 4 and appendix D) is the one that stays finite
    at both ends: epsilon says nothing about the image where alpha = 0, and sample nothing about the noise at sigma = 0.

    Raises:
        InvalidRequest: epsilon is predicted where alpha = 0.
    """
    alpha, sigma = math.sqrt(alpha_cumprod), math.sqrt(1 - alpha_cumprod)
    if schedule.prediction_type == "v_prediction":
        return alpha * x - sigma * output, alpha * output + sigma * x
    if schedule.prediction_type == "sample":
        return output, (x - alpha * output) / sigma
    if alpha == 0:
        raise InvalidRequest(
            "The checkpoint's scheduler config has rescale_betas_zero_snr=true and prediction_type='epsilon': at the "
            "first timestep there is only noise, and predicting that gives no image. Use a sampler other than ddim and "
            "lcm, or set rescale_betas_zero_snr to false in scheduler_config.json and export the checkpoint again."
        )
    return (x - sigma * output) / alpha, output


def preserving(alpha_cumprod: float) -> tuple[float, float]:
    """`Evaluation.noising` of variance-preserving latents, alpha x0 + sigma eps, at alpha^2."""
    return math.sqrt(alpha_cumprod), math.sqrt(1 - alpha_cumprod)


def alpha_at_sigma(sigma: float) -> float:
    """alpha_t of the variance-preserving latents whose sigma_t / alpha_t is `sigma`."""
    return 1 / math.sqrt(sigma**2 + 1)


def x0_at_sigma(schedule: NoiseSchedule, sigma: float, x: Row, output: Row) -> Row:
    """The predicted image where the latents are variance exploding, x = x0 + sigma eps."""
    alpha = alpha_at_sigma(sigma)
    return x0_and_eps(schedule, alpha**2, alpha * x, output)[0]


def with_final(schedule: NoiseSchedule, sigmas: NDArray[Any], final_sigmas_type: str) -> NDArray[np.float64]:
    """Appends where the last step leads. Rounded to float32 on the way, as diffusers keeps sigmas."""
    final = 0.0 if final_sigmas_type == "zero" else schedule.sigmas[0]
    return np.append(sigmas, final).astype(np.float32).astype(np.float64)


def initial_sigma(schedule: NoiseSchedule, sigmas: NDArray[np.float64]) -> float:
    """`init_noise_sigma` of latents that are x0 + sigma eps.

    With leading spacing the first timestep is not the last of training, and diffusers counts the image's own variance.
    """
    highest = float(sigmas.max())
    return math.sqrt(highest**2 + 1) if schedule.timestep_spacing == "leading" else highest


def refuse_zero_snr(sampler: str, schedule: NoiseSchedule) -> None:
    """For samplers whose diffusers class knows no `rescale_betas_zero_snr`, and would sample with other betas than the
    checkpoint was trained with.

    Raises:
        InvalidRequest: the checkpoint's scheduler config has it.
    """
    if schedule.rescale_betas_zero_snr:
        raise InvalidRequest(
            f"sampler is {sampler!r}, which cannot start from pure noise, and this checkpoint's scheduler config has "
            "rescale_betas_zero_snr=true. Use another, such as ddim, euler or dpmpp_2m."
        )
