"""Every sampler by name, the one place to add one to; and a sampler's trajectory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from diffuserve.errors import InvalidRequest
from diffuserve.samplers.ddim import ddim
from diffuserve.samplers.dpm_solver import dpmpp_2m, dpmpp_2m_karras, dpmpp_2m_sde, dpmpp_2m_sde_karras, unipc
from diffuserve.samplers.euler import euler, euler_a, heun
from diffuserve.samplers.lcm import lcm
from diffuserve.samplers.matrices import Trajectory
from diffuserve.samplers.noise_schedule import NoiseSchedule
from diffuserve.samplers.pndm import pndm

Builder = Callable[[NoiseSchedule, int, int], Trajectory]


@dataclass(frozen=True)
class Sampler:
    """One entry of SAMPLERS.

    Attributes:
        build: makes its trajectory, of (schedule, steps, start).
        scheduler: the class in diffusers that it equals.
        infotext: its name in AUTOMATIC1111's web UI, and so in the text inside images.
        settings: what the class is made with beside the settings of the checkpoint.
        spaced: whether the web UI lets one choose its schedule type; else its timesteps are its own.
    """

    build: Builder
    scheduler: str
    infotext: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    spaced: bool = True


def _dpmpp(build: Builder, infotext: str, algorithm_type: str, *, karras: bool) -> Sampler:
    settings = {"algorithm_type": algorithm_type, "use_karras_sigmas": karras}
    return Sampler(build, "DPMSolverMultistepScheduler", infotext, settings)


_NOT_KARRAS = {"use_karras_sigmas": False}

SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    {
        "ddim": Sampler(ddim, "DDIMScheduler", "DDIM", spaced=False),
        "euler": Sampler(euler, "EulerDiscreteScheduler", "Euler", _NOT_KARRAS),
        "euler_a": Sampler(euler_a, "EulerAncestralDiscreteScheduler", "Euler a"),
        "dpmpp_2m": _dpmpp(dpmpp_2m, "DPM++ 2M", "dpmsolver++", karras=False),
        "dpmpp_2m_karras": _dpmpp(dpmpp_2m_karras, "DPM++ 2M", "dpmsolver++", karras=True),
        "dpmpp_2m_sde": _dpmpp(dpmpp_2m_sde, "DPM++ 2M SDE", "sde-dpmsolver++", karras=False),
        "dpmpp_2m_sde_karras": _dpmpp(dpmpp_2m_sde_karras, "DPM++ 2M SDE", "sde-dpmsolver++", karras=True),
        "unipc": Sampler(unipc, "UniPCMultistepScheduler", "UniPC", _NOT_KARRAS, spaced=False),
        "heun": Sampler(heun, "HeunDiscreteScheduler", "Heun", _NOT_KARRAS),
        "pndm": Sampler(pndm, "PNDMScheduler", "PNDM", spaced=False),
        "lcm": Sampler(lcm, "LCMScheduler", "LCM", spaced=False),
    }
)


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
    return SAMPLERS[sampler].build(schedule, steps, start)


def sampler_from_config(config: Mapping[str, Any]) -> str:
    """The sampler that a checkpoint's own scheduler is, by the content of its scheduler_config.json.

    A scheduler that is none of these here gets dpmpp_2m, at Karras et al.'s sigmas if it asks for them. And
    DPMSolverMultistepScheduler is several, by its settings.
    """
    karras = bool(config.get("use_karras_sigmas"))
    own = next((name for name, each in SAMPLERS.items() if each.scheduler == config.get("_class_name")), "dpmpp_2m")
    if karras or own == "dpmpp_2m":
        stochastic = config.get("algorithm_type") == "sde-dpmsolver++"
        return "dpmpp_2m" + "_sde" * stochastic + "_karras" * karras
    return own
