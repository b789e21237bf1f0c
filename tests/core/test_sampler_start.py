"""Trajectories that begin in the middle, over an image: as diffusers' image-to-image drives its schedulers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from diffuserve.errors import InvalidRequest
from diffuserve.samplers import SAMPLERS, NoiseSchedule, Trajectory, noised_state, trajectory
from diffuserve.samplers.noise import Generator
from tests.core.test_samplers import SHAPE, STABLE_DIFFUSION, _reference, drawn, drawn_by_diffusers

STEPS = 20
STARTS = (0, 1, 7, 18, 19)
CONFIGS: dict[str, dict[str, Any]] = {
    "sd1": STABLE_DIFFUSION,
    "trailing": {**STABLE_DIFFUSION, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    "linspace": {**STABLE_DIFFUSION, "timestep_spacing": "linspace", "final_sigmas_type": "sigma_min"},
}
IMAGE = np.random.default_rng(3).standard_normal(SHAPE, dtype=np.float32)


def _latents(table: Trajectory, seed: int = 5) -> NDArray[np.float32]:
    generator = Generator(seed)
    return drawn(table, noised_state(IMAGE, generator.randn(SHAPE), table), generator)


def _reference_latents(scheduler: Any, start: int, seed: int = 5) -> NDArray[np.float32]:
    """As StableDiffusionImg2ImgPipeline: `get_timesteps`, `prepare_latents` and its loop."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(STEPS)
    timesteps = scheduler.timesteps[start * scheduler.order :]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * scheduler.order)
    noise = torch.randn((1, *SHAPE), generator=generator)
    latents = scheduler.add_noise(torch.from_numpy(IMAGE)[None], noise, timesteps[:1])
    return drawn_by_diffusers(scheduler, timesteps, latents, generator)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "pndm"])
def test_every_start_matches_diffusers(sampler: str, config: str) -> None:
    schedule = NoiseSchedule.from_config(CONFIGS[config])
    for start in STARTS:
        table = trajectory(schedule, sampler, STEPS, start)
        expected = _reference_latents(_reference(sampler, CONFIGS[config]), start)
        assert table.steps == STEPS - start
        error = float(np.abs(_latents(table) - expected).max() / np.abs(expected).max())
        assert error < 1e-5, f"{sampler} from step {start}"


@pytest.mark.parametrize("start", STARTS)
def test_pndm_begins_as_it_does_at_the_top(start: int) -> None:
    # diffusers' pipelines cut PNDM's timesteps, of which the second stands twice at the top only, so that from there on
    # the UNet is told a timestep that the latents have not reached. Here its scheduler gets the list as it is meant.
    scheduler = _reference("pndm", STABLE_DIFFUSION)
    scheduler.set_timesteps(STEPS)
    spaced = torch.unique(scheduler.timesteps).flip(0)[start:]
    scheduler.timesteps = torch.cat([spaced[:2], spaced[1:]])
    scheduler.plms_timesteps = scheduler.timesteps
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn((1, *SHAPE), generator=generator)
    latents = scheduler.add_noise(torch.from_numpy(IMAGE)[None], noise, spaced[:1])
    expected = drawn_by_diffusers(scheduler, scheduler.timesteps, latents, generator)
    table = trajectory(NoiseSchedule.from_config(STABLE_DIFFUSION), "pndm", STEPS, start)
    np.testing.assert_allclose(table.timesteps, scheduler.timesteps.numpy())
    error = float(np.abs(_latents(table) - expected).max() / np.abs(expected).max())
    assert error < 1e-5


def test_pndms_runge_kutta_begins_where_it_is_told() -> None:
    schedule = NoiseSchedule.from_config({**STABLE_DIFFUSION, "skip_prk_steps": False})
    whole, late = trajectory(schedule, "pndm", STEPS), trajectory(schedule, "pndm", STEPS, 5)
    jump = 1000 // STEPS
    # Four evaluations per step for the first three, the same pattern of timesteps further down.
    np.testing.assert_array_equal(late.timesteps[:12], whole.timesteps[:12] - 5 * jump)
    assert late.evaluations == whole.evaluations - 5
    with pytest.raises(InvalidRequest, match="3 of them are left to draw over an image"):
        trajectory(schedule, "pndm", STEPS, 17)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_noise_of_every_evaluation_is_that_of_a_start_there(sampler: str) -> None:
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    whole = trajectory(schedule, sampler, STEPS)
    # A step's first evaluation comes after the one that completes the step before.
    first = [0, *(np.searchsorted(whole.steps_done, range(1, STEPS)) + 1)]
    for start in range(STEPS):
        table = trajectory(schedule, sampler, STEPS, start)
        np.testing.assert_array_equal(table.noising[0], whole.noising[first[start]])
        assert table.timesteps[0] == whole.timesteps[first[start]]


@pytest.mark.parametrize("start", [-1, STEPS, STEPS + 1])
def test_a_start_beyond_the_steps_is_refused(start: int) -> None:
    with pytest.raises(InvalidRequest, match=f"start is {start}; it must be 0 to 19"):
        trajectory(NoiseSchedule.from_config(STABLE_DIFFUSION), "ddim", STEPS, start)
