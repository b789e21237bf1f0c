"""diffusers' own schedulers, which the samplers are to equal."""

from __future__ import annotations

from typing import Any

import diffusers

# By sampler: the class, and the settings that the sampler's name stands for.
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {"use_karras_sigmas": False}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": (
        diffusers.DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver++", "use_karras_sigmas": False},
    ),
    "dpmpp_2m_karras": (
        diffusers.DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
    ),
    "dpmpp_2m_sde": (
        diffusers.DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": False},
    ),
    "dpmpp_2m_sde_karras": (
        diffusers.DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "unipc": (diffusers.UniPCMultistepScheduler, {"use_karras_sigmas": False}),
    "heun": (diffusers.HeunDiscreteScheduler, {"use_karras_sigmas": False}),
    "pndm": (diffusers.PNDMScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {}),
}


def scheduler_of(sampler: str, config: Any) -> Any:
    """The sampler's class with the settings of a checkpoint, `config` being that of its own scheduler."""
    scheduler_class, settings = SCHEDULERS[sampler]
    return scheduler_class.from_config(config, **settings)
