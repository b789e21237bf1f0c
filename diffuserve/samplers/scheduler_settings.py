"""Every setting that a scheduler_config.json may have, and what becomes of it here.

A checkpoint's scheduler may be any of diffusers'; samplers here are others than it, and take its settings as diffusers does
when a scheduler of another class is made from it. So each setting is used (the fields of `NoiseSchedule`), has the one
value that is implemented, or none of the samplers' classes looks at it. What is none of these is refused at export.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from diffuserve.errors import BundleError

# Settings whose other values ask for what no sampler here does, with the values that are implemented. The first of each
# is the default. diffusers itself replaces "logrho", "bh1" and "bh2" by the first value.
IMPLEMENTED: Mapping[str, tuple[object, ...]] = {
    "thresholding": (False,),  # clips by a quantile of the latents, which is not linear
    "use_karras_sigmas": (False, None, True),  # at which sigmas is in the samplers' names
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "use_dynamic_shifting": (False, None),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "shift_terminal": (None,),
    "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
    "solver_order": (2,),
    "lambda_min_clipped": (-math.inf, None),  # msgspec writes infinity as null
    # What is added between steps, in DDPM; "learned" and "learned_range" mean that the UNet predicts it too.
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    "predict_x0": (True,),
    "disable_corrector": ([],),
    "solver_p": (None,),
    "predict_epsilon": (None, True),  # diffusers' until 0.10, before prediction_type
}

# Settings that change no image here, and why.
HARMLESS: Mapping[str, str] = {
    "clip_sample": "StableDiffusionPipeline turns it off, and for others an export refuses it",
    "clip_sample_range": "of clip_sample",
    "dynamic_thresholding_ratio": "of thresholding",
    "sample_max_value": "of thresholding",
    "flow_shift": "of use_flow_sigmas",
    "time_shift_type": "of use_dynamic_shifting",
    "algorithm_type": "which algorithm it is, is in the samplers' names",
    "predictor_order": "of SASolverScheduler, which no sampler is",
    "corrector_order": "of SASolverScheduler",
    "tau_func": "of SASolverScheduler",
    "noise_sampler_seed": "of DPMSolverSDEScheduler, which no sampler is",
    "tensor_format": "whether PyTorch's or NumPy's, diffusers' until 0.3",
}

_OFF = (None, False)


def check_implemented(config: Mapping[str, Any]) -> None:
    """Raises BundleError for a setting of another value than those that are implemented."""
    for name, implemented in IMPLEMENTED.items():
        check_choice(name, config.get(name, implemented[0]), implemented)


def check_known(config: Mapping[str, Any], used: Collection[str]) -> None:
    """Raises BundleError for a setting that is on, and of which nothing is known here.

    Args:
        config: the content of a scheduler_config.json.
        used: settings that are read.
    """
    for name, value in config.items():
        # diffusers' own notes begin with an underscore.
        known = name.startswith("_") or name in used or name in IMPLEMENTED or name in HARMLESS
        if not known and not any(value is off for off in _OFF):
            raise BundleError(
                f"scheduler_config.json has {name}={value!r}, which no scheduler known here has. If the checkpoint can be "
                f"sampled without it, remove {name} there and export it again."
            )


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raises BundleError for a value that is none of those allowed."""
    if value not in allowed:
        choices = " or ".join(repr(choice) for choice in allowed if choice is not None) or "null"
        raise BundleError(
            f"scheduler_config.json has {name}={value!r}, which is not implemented; it may be {choices}. If the "
            f"checkpoint can be sampled without it, change {name} there and export it again."
        )
