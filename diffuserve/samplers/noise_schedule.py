"""The noise schedule that a checkpoint was trained with, read from its scheduler_config.json.

Training mixes image and noise as x_t = alpha_t x0 + sigma_t eps with alpha_t^2 + sigma_t^2 = 1 ("variance preserving",
Ho et al., arXiv:2006.11239, eq. 4), for t = 0 .. T-1. `alphas_cumprod` holds alpha_t^2. Some samplers are easier to
state for x_t / alpha_t = x0 + sigma eps ("variance exploding"); `sigmas` holds that sigma = sigma_t / alpha_t.

The config is read as diffusers reads it when a scheduler of another class is made from it
(`Scheduler.from_config(pipe.scheduler.config)`): settings that are not in the file take the defaults of the class that
runs, not of the class that wrote it. The samplers' classes differ in the defaults of `timestep_spacing` and
`set_alpha_to_one`; None stands for them here. (Some differ in those of the betas too; `export` wants them in the file.)
Which algorithm it is, and whether at Karras et al.'s sigmas, is in the samplers' names. `clip_sample` is ignored:
StableDiffusionPipeline itself turns it off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffuserve.errors import BundleError, InvalidRequest
from diffuserve.samplers.scheduler_settings import check_choice, check_implemented

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")
FINAL_SIGMAS_TYPES = ("zero", "sigma_min")

_MOST_TIMESTEPS = 100_000  # published models have 1000
_FIX = "Fix it and export the checkpoint again."


@dataclass(frozen=True)
class NoiseSchedule:
    """What sampling depends on, in diffusers' names and with its defaults. Hashable, so that tables can be cached."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool | None = None
    final_sigmas_type: str = "zero"
    lower_order_final: bool = True
    euler_at_final: bool = False
    solver_type: str = "midpoint"
    skip_prk_steps: bool = False
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Reads the content of a scheduler_config.json; settings that no sampler here uses are ignored.

        Raises:
            BundleError: a setting is of the wrong type, or asks for something that is not implemented.
        """
        check_implemented(config)
        schedule = cls(
            num_train_timesteps=_number(config, "num_train_timesteps", cls.num_train_timesteps, int),
            beta_start=_number(config, "beta_start", cls.beta_start, float),
            beta_end=_number(config, "beta_end", cls.beta_end, float),
            beta_schedule=config.get("beta_schedule", cls.beta_schedule),
            trained_betas=_betas(config),
            rescale_betas_zero_snr=_flag(config, "rescale_betas_zero_snr", cls.rescale_betas_zero_snr),
            prediction_type=config.get("prediction_type", cls.prediction_type),
            timestep_spacing=config.get("timestep_spacing"),
            steps_offset=_number(config, "steps_offset", cls.steps_offset, int),
            set_alpha_to_one=_flag(config, "set_alpha_to_one", cls.set_alpha_to_one),
            final_sigmas_type=config.get("final_sigmas_type", cls.final_sigmas_type),
            lower_order_final=_flag(config, "lower_order_final", cls.lower_order_final),
            euler_at_final=_flag(config, "euler_at_final", cls.euler_at_final),
            solver_type=config.get("solver_type", cls.solver_type),
            skip_prk_steps=_flag(config, "skip_prk_steps", cls.skip_prk_steps),
            original_inference_steps=_number(config, "original_inference_steps", cls.original_inference_steps, int),
            timestep_scaling=_number(config, "timestep_scaling", cls.timestep_scaling, float),
        )
        schedule._check()
        return schedule

    def _check(self) -> None:
        if self.trained_betas is None:
            check_choice("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        elif len(self.trained_betas) != self.num_train_timesteps:
            raise BundleError(
                f"scheduler_config.json has {len(self.trained_betas)} trained_betas for num_train_timesteps="
                f"{self.num_train_timesteps}; there must be one for each. {_FIX}"
            )
        check_choice("prediction_type", self.prediction_type, PREDICTION_TYPES)
        check_choice("final_sigmas_type", self.final_sigmas_type, FINAL_SIGMAS_TYPES)
        if self.timestep_spacing is not None:
            check_choice("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        if (
            not 2 <= self.num_train_timesteps <= _MOST_TIMESTEPS
            or not 0 <= self.steps_offset < self.num_train_timesteps
        ):
            raise BundleError(
                f"scheduler_config.json has num_train_timesteps={self.num_train_timesteps} and steps_offset="
                f"{self.steps_offset}; from 2 to {_MOST_TIMESTEPS}, and from 0 to less than that, are allowed. {_FIX}"
            )
        betas = self.trained_betas or (self.beta_start, self.beta_end)
        if not all(0 <= beta < 1 for beta in betas):
            raise BundleError(
                f"scheduler_config.json has betas from {min(betas)} to {max(betas)}; they must be from 0 to less than 1. {_FIX}"
            )
        if self.original_inference_steps < 1 or self.timestep_scaling <= 0:
            raise BundleError(
                f"scheduler_config.json has original_inference_steps={self.original_inference_steps} and "
                f"timestep_scaling={self.timestep_scaling}; at least 1 and more than 0 are needed. {_FIX}"
            )

    @cached_property
    def betas(self) -> NDArray[np.float32]:
        """(T,) float32 in 0..1: the variance of the noise that each training timestep adds."""
        steps = self.num_train_timesteps
        if self.trained_betas is not None:
            betas = np.asarray(self.trained_betas)
        elif self.beta_schedule == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, steps)
        elif self.beta_schedule == "scaled_linear":  # Stable Diffusion's
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, steps).astype(np.float32) ** 2
        else:  # squaredcos_cap_v2: Nichol and Dhariwal, arXiv:2102.09672, eq. 17
            alpha_bar = np.cos((np.linspace(0, 1, steps + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
            betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
        betas = betas.astype(np.float32)
        return _rescale_zero_terminal_snr(betas) if self.rescale_betas_zero_snr else betas

    @cached_property
    def alphas_cumprod(self) -> NDArray[np.float32]:
        """(T,) float32 in 0..1, falling: alpha_t^2, the share of the image in the variance of x_t.

        Single precision, since it is what diffusers trains and samples with, and near t = T the rounding is not small:
        with cosine betas, 1 - beta is 0.001 and the last value is off by 1e-5 of itself.
        """
        return _cumprod(np.float32(1) - self.betas)

    def alpha_cumprod_at(self, timestep: int, *, default_set_alpha_to_one: bool) -> float:
        """`alphas_cumprod` at a timestep of training's; below 0, where the last step may lead, `final_alpha_cumprod` of
        diffusers: 1, the image itself, or that of timestep 0.

        Args:
            timestep: up to T-1.
            default_set_alpha_to_one: of the sampler's class, where the config has none.
        """
        to_one = default_set_alpha_to_one if self.set_alpha_to_one is None else self.set_alpha_to_one
        return 1.0 if timestep < 0 and to_one else float(self.alphas_cumprod[max(timestep, 0)])

    @cached_property
    def alphas_cumprod_above_zero(self) -> NDArray[np.float32]:
        """`alphas_cumprod` for samplers that divide by alpha: at zero SNR the last is 2^-24, as in diffusers."""
        alphas_cumprod = self.alphas_cumprod.copy()
        if self.rescale_betas_zero_snr:
            alphas_cumprod[-1] = 2**-24
        return alphas_cumprod

    @cached_property
    def sigmas(self) -> NDArray[np.float32]:
        """(T,) float32, rising from about 0.03 to 15 in Stable Diffusion: the noise in x_t / alpha_t."""
        alphas_cumprod = self.alphas_cumprod_above_zero
        sigmas: NDArray[np.float32] = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)
        return sigmas

    def inference_timesteps(
        self, steps: int, *, default_spacing: str, points: int | None = None
    ) -> NDArray[np.float64]:
        """(steps,) float64, falling, 0..T-1: spaced as in Lin et al., arXiv:2305.08891, table 2.

        Args:
            steps: 1..T-1.
            default_spacing: of the sampler's class, where the config has none.
            points: into how many linspace and leading divide the range, where that is more than the steps.

        Raises:
            InvalidRequest: `steps_offset` moves the first of so many steps out of the range.
        """
        total, points = self.num_train_timesteps, points or steps
        spacing = self.timestep_spacing or default_spacing
        timesteps: NDArray[np.float64]
        if spacing == "linspace":
            timesteps = np.linspace(0, total - 1, points)[::-1][:steps]
        elif spacing == "leading":
            timesteps = np.arange(points, dtype=np.float64)[::-1][:steps] * (total // points) + self.steps_offset
        else:  # trailing. Cut, since for some numbers of steps (49) rounding makes arange one too long, in diffusers too.
            timesteps = np.arange(total, 0, -total / steps).round()[:steps] - 1
        if timesteps[0] > total - 1:
            raise InvalidRequest(
                f"steps is {steps}: with the checkpoint's steps_offset={self.steps_offset} the first timestep would be "
                f"{timesteps[0]:g}, and the last that the model knows is {total - 1}. Ask for fewer steps."
            )
        return timesteps

    def sigma_at(self, timesteps: NDArray[Any]) -> NDArray[np.float64]:
        """Sigmas at timesteps that may lie between two of training's: linear interpolation. (n,) to (n,) float64."""
        return np.interp(timesteps, np.arange(self.num_train_timesteps), self.sigmas)

    def timestep_at(self, sigmas: NDArray[np.float64]) -> NDArray[np.float64]:
        """The inverse, linear in log sigma: `_sigma_to_t` of diffusers. (n,) to (n,) float64 in 0..T-1."""
        return np.interp(np.log(sigmas), np.log(self.sigmas), np.arange(self.num_train_timesteps))

    def karras_sigmas(self, steps: int) -> NDArray[np.float64]:
        """(steps,) float64, falling: Karras et al., arXiv:2206.00364, eq. 5 with rho = 7, over the trained range."""
        rho = 7.0
        highest, lowest = float(self.sigmas[-1]) ** (1 / rho), float(self.sigmas[0]) ** (1 / rho)
        sigmas: NDArray[np.float64] = (highest + np.linspace(0, 1, steps) * (lowest - highest)) ** rho
        return sigmas


def _cumprod(factors: NDArray[np.float32]) -> NDArray[np.float32]:
    """torch.cumprod on a CPU: accumulated in float64, each product rounded to float32."""
    return np.cumprod(factors, dtype=np.float64).astype(np.float32)


def _rescale_zero_terminal_snr(betas: NDArray[np.float32]) -> NDArray[np.float32]:
    """Lin et al., arXiv:2305.08891, algorithm 1: shifts and scales alpha_t: the last becomes 0, the first stays."""
    alphas = np.sqrt(_cumprod(np.float32(1) - betas))
    first, last = alphas[0], alphas[-1]
    alphas_cumprod = ((alphas - last) * (first / (first - last))) ** 2
    ratios = np.concatenate([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    rescaled: NDArray[np.float32] = np.float32(1) - ratios
    return rescaled


def _number(config: Mapping[str, Any], name: str, default: Any, kind: type) -> Any:
    value = config.get(name, default)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or kind(value) != value:
        expected = "a whole number" if kind is int else "a number"
        raise BundleError(f"scheduler_config.json has {name}={value!r}; it must be {expected}. {_FIX}")
    return kind(value)


def _betas(config: Mapping[str, Any]) -> tuple[float, ...] | None:
    values = config.get("trained_betas")
    if values is None:
        return None
    try:
        betas = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        betas = (math.nan,)
    if not all(map(math.isfinite, betas)):
        raise BundleError(f"scheduler_config.json has trained_betas that are not a list of numbers. {_FIX}")
    return betas


def _flag(config: Mapping[str, Any], name: str, default: Any) -> Any:
    value = config.get(name, default)
    if value is not default and not isinstance(value, bool):
        raise BundleError(f"scheduler_config.json has {name}={value!r}; it must be true or false. {_FIX}")
    return value
