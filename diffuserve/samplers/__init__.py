"""Samplers as tables: each is linear, so a whole trajectory is a list of small matrices, known before it starts.

Every sampler here computes the next latents as a linear combination of the current latents, the UNet's output, what it
remembers of earlier ones, and fresh noise. Only the weights differ, from sampler to sampler and from step to step, and
they depend on nothing but the noise schedule and the number of steps. So a request's trajectory is a table:

    state S             (K, C, h, w) for each image: slot 0 is the latents, the others are the sampler's memory
    UNet evaluation i   model_output = unet(input_scale[i] * S[0], timesteps[i])
    next state          S = update[i] @ [S[0] .. S[K-1], model_output, noise]         update[i]: (K, K + 2)

What the sampler is, and whether the UNet predicts noise, v or the image, is inside the matrices. So rows of one batch
may be at different steps of different samplers, and `advance` takes them all one step on. Each sampler has as many slots
as it needs, 1 to 6. Most evaluate the UNet once a step; heun and pndm do so more often.

The matrices are not derived by hand. A linear map is known by what it does to unit vectors, so each builder runs the
sampler's published formulas once on the unit vectors of [S_0 .. S_{K-1}, model_output, noise]: `x`, its memory, `output`
and `noise` are those vectors, `x0 = (x - sigma * output) / alpha` is the row of weights that makes x0, and an
evaluation's `state` is the list of rows that make the new slots. In float64, so that weights which cancel do so exactly.

    table.py        the table, its builder from evaluations, advancing by it
    latents.py      x0, eps, alpha and sigma: the formulas that samplers share
    ddim.py, pndm.py, lcm.py, euler.py, dpm_solver.py

To add a sampler: write a function of (schedule, steps, start) that returns a Trajectory, and name it in SAMPLERS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from diffuserve.errors import InvalidRequest
from diffuserve.samplers.ddim import ddim
from diffuserve.samplers.dpm_solver import dpmpp_2m, dpmpp_2m_karras, dpmpp_2m_sde, dpmpp_2m_sde_karras, unipc
from diffuserve.samplers.euler import euler, euler_a, heun
from diffuserve.samplers.lcm import lcm
from diffuserve.samplers.noise_schedule import NoiseSchedule
from diffuserve.samplers.pndm import pndm
from diffuserve.samplers.table import Trajectory, advance, initial_state, noised_state

__all__ = [
    "SAMPLERS",
    "NoiseSchedule",
    "Trajectory",
    "advance",
    "initial_state",
    "noised_state",
    "sampler_from_config",
    "trajectory",
]

Builder = Callable[[NoiseSchedule, int, int], Trajectory]

SAMPLERS: Mapping[str, Builder] = MappingProxyType(
    {
        "ddim": ddim,
        "euler": euler,
        "euler_a": euler_a,
        "dpmpp_2m": dpmpp_2m,
        "dpmpp_2m_karras": dpmpp_2m_karras,
        "dpmpp_2m_sde": dpmpp_2m_sde,
        "dpmpp_2m_sde_karras": dpmpp_2m_sde_karras,
        "unipc": unipc,
        "heun": heun,
        "pndm": pndm,
        "lcm": lcm,
    }
)

# DPMSolverMultistepScheduler is several, by its settings.
_SAMPLER_OF_SCHEDULER = {
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "UniPCMultistepScheduler": "unipc",
    "HeunDiscreteScheduler": "heun",
    "PNDMScheduler": "pndm",
    "LCMScheduler": "lcm",
}


@lru_cache(maxsize=256)
def trajectory(schedule: NoiseSchedule, sampler: str, steps: int, start: int = 0) -> Trajectory:
    """The table of a sampler over a number of steps. Cached: all requests with the same settings share one.

    Args:
        steps: that lead from noise to image.
        start: the first of them that is made, 0 .. steps - 1: an image is noised to there and drawn over from there on
            (diffusers' image-to-image has `start = steps - int(steps * strength)`). The sampler begins there as it does at
            0, with nothing remembered: multistep samplers with a step of first order.

    Raises:
        InvalidRequest: there is no such sampler, or it cannot take so many steps, or it does not go with the
            checkpoint's noise schedule.
    """
    if sampler not in SAMPLERS:
        raise InvalidRequest(f"sampler is {sampler!r}; it must be one of {', '.join(SAMPLERS)}.")
    if not 1 <= steps < schedule.num_train_timesteps:
        raise InvalidRequest(
            f"steps is {steps}; it must be 1 to {schedule.num_train_timesteps - 1}, "
            "since the model knows no more than that many levels of noise."
        )
    if not 0 <= start < steps:
        raise InvalidRequest(f"start is {start}; it must be 0 to {steps - 1}, one less than steps.")
    return SAMPLERS[sampler](schedule, steps, start)


def sampler_from_config(config: Mapping[str, Any]) -> str:
    """The sampler that a checkpoint's own scheduler is, by the content of its scheduler_config.json.

    A scheduler that is none of these here gets dpmpp_2m, at Karras et al.'s sigmas if it asks for them.
    """
    karras = bool(config.get("use_karras_sigmas"))
    own = _SAMPLER_OF_SCHEDULER.get(str(config.get("_class_name")))
    if own is not None and not karras:
        return own
    stochastic = config.get("algorithm_type") == "sde-dpmsolver++"
    return "dpmpp_2m" + "_sde" * stochastic + "_karras" * karras
