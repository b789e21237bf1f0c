"""diffusers' own schedulers, which the samplers equal."""

from __future__ import annotations

from typing import Any

from diffuserve.samplers import SAMPLERS


def scheduler_from_sampler(name: str, config: Any) -> Any:
    """The sampler's scheduler with the settings of a checkpoint, `config` being that of its own scheduler."""
    import diffusers

    sampler = SAMPLERS[name]
    return getattr(diffusers, sampler.scheduler).from_config(config, **sampler.settings)
