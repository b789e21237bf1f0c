"""Samplers as tables: each is linear, so a whole trajectory is a list of small matrices, known before it starts.

Every sampler here computes the next latents as a linear combination of the current latents, the UNet's output, what it
remembers of earlier outputs, and fresh noise. Only the weights differ, from sampler to sampler and from step to step,
and they depend on nothing but the noise schedule and the number of steps. So a request's trajectory is a table:

    state S             (K, C, h, w) for each image: slot 0 is the latents, the others are the sampler's memory
    UNet evaluation i   model_output = unet(input_scale[i] * S[0], timesteps[i])
    next state          S = update[i] @ [S[0] .. S[K-1], model_output, noise]         update[i]: (K, K + 2)

What the sampler is, and whether the UNet predicts noise, v or the image, is inside the matrices. So rows of one batch
may be at different steps of different samplers, and `advance` takes them all one step on in a single matrix product.

The matrices are not derived by hand. A linear map is known by what it does to unit vectors, so each builder below runs
the sampler's published formulas once on the unit vectors of [S_0 .. S_{K-1}, model_output, noise]: `x`, `memory`,
`output` and `noise` are those vectors, `x0 = (x - sigma * output) / alpha` is the row of weights that makes x0, and
`update[i]` is the list of rows that make the new slots. In float64, so that weights which cancel do so exactly.

To add a sampler: write a function of (schedule, steps) that returns a Trajectory, and name it in SAMPLERS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffuserve.errors import BundleError, InvalidRequest
from diffuserve.noise_schedule import NoiseSchedule

__all__ = ["SAMPLERS", "SLOTS", "NoiseSchedule", "Trajectory", "advance", "initial_state", "trajectory"]

Float32 = NDArray[np.float32]
Row = NDArray[np.float64]  # weights of [S_0 .. S_{K-1}, model_output, noise]: (K + 2,) float64

SLOTS = 2  # K, the same for all samplers, so that their matrices stack: the latents and one earlier prediction
_UNIT: NDArray[np.float64] = np.eye(SLOTS + 2)
_NOTHING: Row = np.zeros(SLOTS + 2)


@dataclass(frozen=True)
class Trajectory:
    """One sampler's way from noise to image in a given number of steps. Shared between requests: arrays are read-only.

    Attributes:
        init_noise_sigma: the initial latents are unit noise times this.
        timesteps: (n,) float32, 0 .. T-1, for the n evaluations of the UNet; may lie between training's timesteps.
        input_scale: (n,) float32, what the latents are multiplied with on their way to the UNet.
        update: (n, K, K + 2) float32, from [S_0 .. S_{K-1}, model_output, noise] to the next state.
        draws_noise: (n,) bool, whether evaluation i is followed by a draw of noise; elsewhere its weights are 0.
        steps_done: (n,) int64, sampling steps completed after evaluation i. The last is `steps`.
        denoised: (n, 2) float32, weights of [S_0, model_output] in the image that evaluation i predicts: for previews.
    """

    sampler: str
    steps: int
    init_noise_sigma: float
    timesteps: Float32
    input_scale: Float32
    update: Float32
    draws_noise: NDArray[np.bool_]
    steps_done: NDArray[np.int64]
    denoised: Float32

    @property
    def evaluations(self) -> int:
        """n, the UNet calls that one row takes."""
        return len(self.timesteps)


def initial_state(noise: Float32, trajectory: Trajectory) -> Float32:
    """One image's state before the first step, (K, C, h, w) float32. `noise`: (C, h, w) float32, unit variance."""
    state = np.zeros((SLOTS, *noise.shape), np.float32)
    np.multiply(noise, np.float32(trajectory.init_noise_sigma), out=state[0])
    return state


def advance(state: Float32, model_output: Float32, noise: Float32, update: Float32) -> Float32:
    """Takes B rows, each at its own step of its own trajectory, one UNet evaluation further.

    Args:
        state: (B, K, C, h, w) float32.
        model_output: (B, C, h, w) float32, the UNet's prediction, after guidance.
        noise: (B, C, h, w) float32, unit variance; zeros in rows whose trajectory draws none.
        update: (B, K, K + 2) float32, `trajectory.update[i]` of each row.

    Returns:
        (B, K, C, h, w) float32. A row's values do not depend on the other rows, to the last bit.
    """
    inputs = np.concatenate([state, model_output[:, None], noise[:, None]], axis=1)
    advanced: Float32 = np.matmul(update, inputs.reshape(*inputs.shape[:2], -1))
    return advanced.reshape(state.shape)


def _ddim(schedule: NoiseSchedule, steps: int) -> Trajectory:
    """Song et al., arXiv:2010.02502, eq. 12 with eta = 0: jump to the predicted image, put back less of the noise.

    Matches DDIMScheduler, which measures the jump in training's timesteps rather than to the next of its own.
    """
    timesteps = schedule.inference_timesteps(steps, default_spacing="leading").round().astype(np.int64)
    alphas_cumprod = schedule.alphas_cumprod.astype(np.float64)
    final = 1.0 if schedule.set_alpha_to_one else alphas_cumprod[0]
    x, _memory, output, _noise = _UNIT
    update, denoised = [], []
    for t in timesteps:
        previous = t - schedule.num_train_timesteps // steps
        x0, eps = _x0_and_eps(schedule, alphas_cumprod[t], x, output)
        to = alphas_cumprod[previous] if previous >= 0 else final
        update.append([math.sqrt(to) * x0 + math.sqrt(1 - to) * eps, _NOTHING])
        denoised.append(x0)
    return _trajectory("ddim", timesteps, update, denoised)


def _euler(schedule: NoiseSchedule, steps: int) -> Trajectory:
    """Karras et al., arXiv:2206.00364, algorithm 1 without its second-order correction: follow dx/dsigma to the next.

    Matches EulerDiscreteScheduler: latents of variance 1 + sigma^2, scaled for the UNet, at fractional timesteps.
    """
    timesteps = schedule.inference_timesteps(steps, default_spacing="linspace")
    sigmas = _with_final(schedule, schedule.sigma_at(timesteps), schedule.final_sigmas_type)
    x, _memory, output, _noise = _UNIT
    update, denoised = [], []
    for sigma, to in pairwise(sigmas):
        x0 = _x0_at_sigma(schedule, sigma, x, output)
        slope = (x - x0) / sigma
        update.append([x + slope * (to - sigma), _NOTHING])
        denoised.append(x0)
    return _trajectory("euler", timesteps, update, denoised, *_variance_exploding(schedule, sigmas))


def _euler_a(schedule: NoiseSchedule, steps: int) -> Trajectory:
    """Euler, but each step goes further down than the next sigma, to sigma_down, and climbs back with fresh noise.

    From k-diffusion's `sample_euler_ancestral`; matches EulerAncestralDiscreteScheduler. `up` is the standard deviation
    of DDPM's posterior (arXiv:2006.11239, eq. 7, in terms of sigma), and down^2 + up^2 = to^2 leaves to^2 / sigma.
    """
    timesteps = schedule.inference_timesteps(steps, default_spacing="linspace")
    sigmas = _with_final(schedule, schedule.sigma_at(timesteps), "zero")
    x, _memory, output, noise = _UNIT
    update, denoised = [], []
    for sigma, to in pairwise(sigmas):
        down = to**2 / sigma
        up = to * math.sqrt(max(0.0, 1 - (to / sigma) ** 2))  # rescaled linear betas make sigmas rise at the top
        x0 = _x0_at_sigma(schedule, sigma, x, output)
        slope = (x - x0) / sigma
        update.append([x + slope * (down - sigma) + up * noise, _NOTHING])
        denoised.append(x0)
    return _trajectory("euler_a", timesteps, update, denoised, *_variance_exploding(schedule, sigmas))


def _dpmpp_2m(schedule: NoiseSchedule, steps: int) -> Trajectory:
    """DPM-Solver++(2M) at the checkpoint's timestep spacing."""
    # linspace and leading divide the range by steps + 1: there is always one more point, at the low end, left out.
    timesteps = schedule.inference_timesteps(steps, default_spacing="linspace", points=steps + 1).round()
    return _dpmpp("dpmpp_2m", schedule, schedule.sigma_at(timesteps), timesteps)


def _dpmpp_2m_karras(schedule: NoiseSchedule, steps: int) -> Trajectory:
    """DPM-Solver++(2M) at Karras et al.'s sigmas: `use_karras_sigmas=True`."""
    sigmas = schedule.karras_sigmas(steps)
    timesteps = schedule.timestep_at(sigmas)
    timesteps[0] = schedule.num_train_timesteps - 1  # the top of the range, which rounding in the powers may miss
    # diffusers truncates for cosine betas and rounds for the others; the UNet is told the timestep, so it matters.
    timesteps = np.trunc(timesteps) if schedule.beta_schedule == "squaredcos_cap_v2" else timesteps.round()
    return _dpmpp("dpmpp_2m_karras", schedule, sigmas, timesteps)


def _dpmpp(sampler: str, schedule: NoiseSchedule, sigmas: NDArray[np.float64], timesteps: NDArray[Any]) -> Trajectory:
    """Lu et al., arXiv:2211.01095, algorithm 2: exact for the linear part, x0 extrapolated from the last two.

    Matches DPMSolverMultistepScheduler (dpmsolver++, order 2, midpoint). In its terms lambda = -log sigma, the step is
    h = log(sigma / to), and e^-h = to / sigma, which stays finite at the last step, where to = 0.
    """
    sigmas = _with_final(schedule, sigmas, schedule.final_sigmas_type)
    steps = len(timesteps)
    last_is_first_order = (
        schedule.euler_at_final
        or (schedule.lower_order_final and steps < 15)
        or schedule.final_sigmas_type == "zero"  # where h, and with it the extrapolation, is infinite
    )
    x, memory, output, _noise = _UNIT
    update, denoised = [], []
    for i, (sigma, to) in enumerate(pairwise(sigmas)):
        alpha, alpha_to = _alpha(sigma), _alpha(to)
        x0, _eps = _x0_and_eps(schedule, alpha**2, x, output)
        if i == 0 or (i == steps - 1 and last_is_first_order):
            estimate = x0
        else:
            h, h_before = math.log(sigma / to), math.log(sigmas[i - 1] / sigma)
            estimate = x0 + 0.5 * (h / h_before) * (x0 - memory)
        x_to = (to * alpha_to) / (sigma * alpha) * x + alpha_to * (1 - to / sigma) * estimate
        update.append([x_to, x0])
        denoised.append(x0)
    return _trajectory(sampler, timesteps, update, denoised)


Builder = Callable[[NoiseSchedule, int], Trajectory]

SAMPLERS: Mapping[str, Builder] = MappingProxyType(
    {
        "ddim": _ddim,
        "euler": _euler,
        "euler_a": _euler_a,
        "dpmpp_2m": _dpmpp_2m,
        "dpmpp_2m_karras": _dpmpp_2m_karras,
    }
)


@lru_cache(maxsize=256)
def trajectory(schedule: NoiseSchedule, sampler: str, steps: int) -> Trajectory:
    """The table of a sampler over a number of steps. Cached: all requests with the same settings share one.

    Raises:
        InvalidRequest: there is no such sampler, or it cannot take so many steps.
        BundleError: the checkpoint's noise schedule does not go with this sampler.
    """
    if sampler not in SAMPLERS:
        raise InvalidRequest(f"sampler is {sampler!r}; it must be one of {', '.join(SAMPLERS)}.")
    if not 1 <= steps < schedule.num_train_timesteps:
        raise InvalidRequest(
            f"steps is {steps}; it must be 1 to {schedule.num_train_timesteps - 1}, "
            "since the model knows no more than that many levels of noise."
        )
    return SAMPLERS[sampler](schedule, steps)


def _with_final(schedule: NoiseSchedule, sigmas: NDArray[Any], final_sigmas_type: str) -> NDArray[np.float64]:
    """Appends where the last step leads. Rounded to float32 on the way, as diffusers keeps sigmas."""
    final = 0.0 if final_sigmas_type == "zero" else schedule.sigmas[0]
    return np.append(sigmas, final).astype(np.float32).astype(np.float64)


def _alpha(sigma: float) -> float:
    """alpha_t of the variance-preserving latents whose sigma_t / alpha_t is `sigma`."""
    return 1 / math.sqrt(sigma**2 + 1)


def _x0_and_eps(schedule: NoiseSchedule, alpha_cumprod: float, x: Row, output: Row) -> tuple[Row, Row]:
    """The image and the noise that the UNet's output says `x` is made of: x = alpha x0 + sigma eps.

    v = alpha eps - sigma x0 (Salimans and Ho, arXiv:2202.00512, section 4 and appendix D) is the one that stays finite
    at both ends: epsilon says nothing about the image where alpha = 0, and sample nothing about the noise at sigma = 0.
    """
    alpha, sigma = math.sqrt(alpha_cumprod), math.sqrt(1 - alpha_cumprod)
    if schedule.prediction_type == "v_prediction":
        return alpha * x - sigma * output, alpha * output + sigma * x
    if schedule.prediction_type == "sample":
        return output, (x - alpha * output) / sigma
    if alpha == 0:
        raise BundleError(
            "The scheduler config has rescale_betas_zero_snr=true and prediction_type='epsilon': at its first timestep "
            "there is only noise, and predicting that gives no image. Use a sampler other than ddim, or set "
            "rescale_betas_zero_snr to false in scheduler_config.json and export the checkpoint again."
        )
    return (x - sigma * output) / alpha, output


def _x0_at_sigma(schedule: NoiseSchedule, sigma: float, x: Row, output: Row) -> Row:
    """The predicted image where the latents are variance exploding, x = x0 + sigma eps."""
    alpha = _alpha(sigma)
    return _x0_and_eps(schedule, alpha**2, alpha * x, output)[0]


def _variance_exploding(schedule: NoiseSchedule, sigmas: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """`input_scale` and `init_noise_sigma` of latents that are x0 + sigma eps.

    With leading spacing the first timestep is not the last of training, and diffusers counts the image's own variance.
    """
    highest = float(sigmas.max())
    init_noise_sigma = math.sqrt(highest**2 + 1) if schedule.timestep_spacing == "leading" else highest
    return 1 / np.sqrt(sigmas[:-1] ** 2 + 1), init_noise_sigma


def _trajectory(
    sampler: str,
    timesteps: NDArray[Any],
    update: list[list[Row]],
    denoised: list[Row],
    input_scale: NDArray[np.float64] | None = None,
    init_noise_sigma: float = 1.0,
) -> Trajectory:
    """A trajectory of one evaluation a step. Variance-preserving latents go to the UNet as they are."""
    table = np.array(update)
    steps = len(timesteps)
    result = Trajectory(
        sampler=sampler,
        steps=steps,
        init_noise_sigma=init_noise_sigma,
        timesteps=timesteps.astype(np.float32),
        input_scale=(np.ones(steps) if input_scale is None else input_scale).astype(np.float32),
        update=table.astype(np.float32),
        draws_noise=table[:, :, -1].any(axis=1),
        steps_done=np.arange(1, steps + 1),
        denoised=np.array(denoised)[:, [0, SLOTS]].astype(np.float32),
    )
    for array in vars(result).values():
        if isinstance(array, np.ndarray):
            array.flags.writeable = False
    return result
