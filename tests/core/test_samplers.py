"""Every sampler against its diffusers class, with a model whose outputs depend on x and t, so that errors compound."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from diffuserve.errors import BundleError, InvalidRequest
from diffuserve.samplers import (
    SAMPLERS,
    NoiseSchedule,
    Trajectory,
    advance,
    initial_state,
    sampler_from_config,
    trajectory,
)
from diffuserve.samplers.noise import Generator
from diffuserve_export.checkpoint.schedulers import scheduler_from_sampler

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# EulerAncestralDiscreteScheduler lacks "sample"; test_prediction_types_agree covers it.
IMPLEMENTED_BY_DIFFUSERS = [pair for pair in product(SAMPLERS, PREDICTION_TYPES) if pair != ("euler_a", "sample")]
SPACINGS = ("leading", "linspace", "trailing")
STEPS = (1, 2, 3, 4, 7, 20, 50)
BETAS: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": np.geomspace(1e-4, 0.02, 1000).tolist()},
}
STABLE_DIFFUSION = {
    **BETAS["scaled_linear"],
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "skip_prk_steps": True,
}
# Counted by hand, as are the evaluations and the draws of noise below.
SLOTS = {
    "ddim": 1,
    "euler": 1,
    "euler_a": 1,
    "dpmpp_2m": 2,
    "dpmpp_2m_karras": 2,
    "dpmpp_2m_sde": 2,
    "dpmpp_2m_sde_karras": 2,
    "unipc": 3,
    "heun": 2,
    "pndm": 4,
    "lcm": 1,
}
DRAW_NOISE = {"euler_a", "dpmpp_2m_sde", "dpmpp_2m_sde_karras", "lcm"}
SHAPE = (4, 4, 4)
TOLERANCE = 5e-6  # of the largest value; 2.3e-6 is the largest error with Stable Diffusion's betas

Model = Callable[[NDArray[np.float32], float], NDArray[np.float32]]


def _model(seed: int = 0) -> Model:
    """A fixed nonlinear function of the UNet's input, shifted by a function of the timestep."""
    size = int(np.prod(SHAPE))
    random = np.random.default_rng(seed)
    weights = (0.5 * np.linalg.qr(random.standard_normal((size, size)))[0]).astype(np.float32)
    shift = random.standard_normal(size).astype(np.float32)

    def model(sample: NDArray[np.float32], timestep: float) -> NDArray[np.float32]:
        inputs = weights @ sample.reshape(-1)
        output: NDArray[np.float32] = inputs + np.sin(inputs) / 2 + np.float32(np.cos(timestep / 200)) * shift
        return output.reshape(SHAPE)

    return model


MODEL = _model()


def _latents(table: Trajectory, seed: int = 5, model: Model = MODEL) -> NDArray[np.float32]:
    generator = Generator(seed)
    return drawn(table, initial_state(generator.randn(SHAPE), table), generator, model)


def drawn(
    table: Trajectory, state: NDArray[np.float32], generator: Generator, model: Model = MODEL
) -> NDArray[np.float32]:
    """The latents after the whole trajectory from a state."""
    for i in range(table.evaluations):
        output = model(table.input_scale[i] * state[0], float(table.timesteps[i]))
        noise = generator.randn(SHAPE) if table.draws_noise[i] else np.zeros(SHAPE, np.float32)
        [state] = advance([state], output[None], noise[None], [table.update[i]])
    return state[0]


def _reference_latents(scheduler: Any, steps: int, seed: int = 5) -> NDArray[np.float32]:
    """As StableDiffusionPipeline drives a scheduler."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # where the first timestep occurs twice, it would start at the second
    latents = torch.randn((1, *SHAPE), generator=generator) * scheduler.init_noise_sigma
    return drawn_by_diffusers(scheduler, scheduler.timesteps, latents, generator)


def drawn_by_diffusers(
    scheduler: Any, timesteps: torch.Tensor, latents: torch.Tensor, generator: torch.Generator
) -> NDArray[np.float32]:
    """The latents after these timesteps, as diffusers' pipelines loop over them."""
    draws = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in timesteps:
        sample = scheduler.scale_model_input(latents, t)
        output = torch.from_numpy(MODEL(sample.numpy(), float(t)))[None]
        latents = scheduler.step(output, t, latents, **draws).prev_sample
    result: NDArray[np.float32] = latents[0].numpy()
    return result


def _reference(sampler: str, config: dict[str, Any], source: Any = diffusers.DDIMScheduler) -> Any:
    """The sampler's class, made from a pipeline's scheduler of another class."""
    return scheduler_from_sampler(sampler, source.from_config({"clip_sample": False, **config}).config)


def _refusal(sampler: str, config: dict[str, Any], steps: int) -> str | None:
    """What the message must name where a sampler does not go with a config or a number of steps."""
    scheduler = SAMPLERS[sampler].scheduler.removesuffix("Scheduler")
    zero_snr, prediction_type = config.get("rescale_betas_zero_snr", False), config.get("prediction_type", "epsilon")
    if zero_snr and scheduler in ("HeunDiscrete", "PNDM"):
        return "rescale_betas_zero_snr"  # which their classes ignore
    if scheduler == "PNDM" and prediction_type == "sample":
        return "prediction_type"  # ValueError in diffusers
    if scheduler == "PNDM" and steps < 4 and not config.get("skip_prk_steps", False):
        return "at least 4"  # ValueError in diffusers
    if scheduler == "LCM" and steps > config.get("original_inference_steps", 50):
        return "original_inference_steps"  # ValueError in diffusers
    if scheduler == "UniPCMultistep" and steps > 1 and not config.get("lower_order_final", True):
        return "lower_order_final" if config.get("final_sigmas_type", "zero") == "zero" else None  # NaN in diffusers
    if zero_snr and prediction_type == "epsilon" and scheduler in ("DDIM", "LCM"):
        spacing = config.get("timestep_spacing", "leading")
        starts_at_the_top = scheduler == "LCM" or spacing == "trailing" or (spacing == "linspace" and steps > 1)
        return "rescale_betas_zero_snr" if starts_at_the_top else None  # NaN in diffusers
    return None


def _check(
    sampler: str, config: dict[str, Any], steps: tuple[int, ...] = STEPS, tolerance: float = TOLERANCE, **options: Any
) -> None:
    schedule, scheduler = NoiseSchedule.from_config(config), _reference(sampler, config, **options)
    for count in steps:
        if message := _refusal(sampler, config, count):
            with pytest.raises(InvalidRequest, match=message):
                trajectory(schedule, sampler, count)
            continue
        table = trajectory(schedule, sampler, count)
        expected = _reference_latents(scheduler, count)
        np.testing.assert_allclose(table.timesteps, scheduler.timesteps.numpy(), rtol=1e-6, atol=1e-4)
        assert table.init_noise_sigma == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-5)
        latents = _latents(table)
        assert np.isfinite(latents).all()
        if sampler == "euler_a" and not np.isfinite(expected).all():
            continue  # diffusers takes the root of sigma_to^2 - sigma_up^2, which rounding can make negative
        # Where sigmas are large, diffusers' Euler, Heun and PNDM are off by some float32 roundings of the largest: they
        # compute x + (x - x0) / sigma * (to - sigma), or the like, whose parts cancel. Here they cancel in float64, in
        # the table. (With diffusers' own sums in float64, Heun and PNDM agree within the tolerance there too.)
        highest = float(schedule.sigma_at(table.timesteps[:1])[0])
        rounding = 5e-7 * highest if sampler in ("euler", "euler_a", "heun", "pndm") else 0
        error = float(np.abs(latents - expected).max() / np.abs(expected).max())
        assert error < max(tolerance, rounding), f"{sampler}, {count} steps, {config}"


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("sampler", "prediction_type"), IMPLEMENTED_BY_DIFFUSERS)
def test_stable_diffusion_matches_diffusers(sampler: str, prediction_type: str, spacing: str) -> None:
    _check(sampler, {**STABLE_DIFFUSION, "prediction_type": prediction_type, "timestep_spacing": spacing})


@pytest.mark.parametrize(  # None: the class's own default
    ("prediction_type", "spacing"), [("epsilon", None), ("v_prediction", None), ("v_prediction", "trailing")]
)
@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_other_betas_match_diffusers(sampler: str, prediction_type: str, betas: str, spacing: str | None) -> None:
    config = {**BETAS[betas], "prediction_type": prediction_type}
    if spacing is not None:
        config["timestep_spacing"] = spacing
    _check(sampler, config, steps=(1, 20))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("sampler", "prediction_type"), IMPLEMENTED_BY_DIFFUSERS)
def test_zero_terminal_snr_matches_diffusers(sampler: str, prediction_type: str, spacing: str) -> None:
    config = {
        **STABLE_DIFFUSION,
        "prediction_type": prediction_type,
        "timestep_spacing": spacing,
        "rescale_betas_zero_snr": True,
    }
    # The rescaling takes differences, so torch's square root (of 1e-7, and not the same on all CPUs) shows.
    _check(sampler, config, steps=(1, 20), tolerance=5e-5)


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_zero_terminal_snr_of_any_betas_is_finite(sampler: str, beta_schedule: str) -> None:
    # Rescaled, these have sigmas above the 4096 of the last timestep, so that they do not fall all the way.
    config = {"beta_schedule": beta_schedule, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    for steps, spacing in product((1, 2, 20, 500, 998), ("linspace", "trailing")):
        if _refusal(sampler, config, steps):
            continue
        table = trajectory(NoiseSchedule.from_config({**config, "timestep_spacing": spacing}), sampler, steps)
        assert np.isfinite(table.update).all()


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize(
    "options",
    [
        {"final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min", "euler_at_final": True},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
        {"lower_order_final": False},
        {"set_alpha_to_one": True, "steps_offset": 0},
        {"steps_offset": 3},
        {"solver_type": "bh2", "algorithm_type": "deis", "final_sigmas_type": "sigma_min"},  # UniPC's and DEIS's files
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},  # the sampler's name says otherwise
    ],
    ids="-".join,
)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_options_match_diffusers(sampler: str, options: dict[str, Any], spacing: str) -> None:
    _check(sampler, {**STABLE_DIFFUSION, "timestep_spacing": spacing, **options}, steps=(3, 20))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("unipc", {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
        ("pndm", {"skip_prk_steps": False}),
        ("pndm", {"skip_prk_steps": False, "prediction_type": "v_prediction"}),
        ("pndm", {"skip_prk_steps": False, "set_alpha_to_one": True}),
        ("lcm", {"original_inference_steps": 30, "timestep_scaling": 0.1}),
    ],
)
def test_options_of_one_sampler_match_diffusers(sampler: str, options: dict[str, Any], spacing: str) -> None:
    _check(sampler, {**STABLE_DIFFUSION, "timestep_spacing": spacing, **options}, steps=(*STEPS, 5, 31))


# As the families publish their schedulers.
_TURBO = {**STABLE_DIFFUSION, "timestep_spacing": "trailing", "prediction_type": "epsilon", "use_karras_sigmas": False}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "sd1": ("pndm", {**STABLE_DIFFUSION, "_class_name": "PNDMScheduler", "trained_betas": None}),
    "sd2": ("ddim", {**STABLE_DIFFUSION, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}),
    "sdxl": (
        "euler",
        {**STABLE_DIFFUSION, "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
    ),
    "sd-turbo": ("euler", {**_TURBO, "_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear"}),
    "sdxl-turbo": ("euler_a", {**_TURBO, "_class_name": "EulerAncestralDiscreteScheduler"}),
    "lcm": (
        "lcm",
        {
            **STABLE_DIFFUSION,
            "_class_name": "LCMScheduler",
            "set_alpha_to_one": True,
            "original_inference_steps": 50,
            "timestep_scaling": 10.0,
            "timestep_spacing": "leading",
        },
    ),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_defaults_are_those_of_the_class_that_runs(sampler: str) -> None:
    # PNDMScheduler, which Stable Diffusion 1 was published with, spaces "leading" unless told; its file does not say.
    config = {**STABLE_DIFFUSION, "_class_name": "PNDMScheduler", "skip_prk_steps": True}
    _check(sampler, config, steps=(7, 20), source=diffusers.PNDMScheduler)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_checkpoints_own_scheduler_is_the_default(name: str) -> None:
    sampler, config = PUBLISHED[name]
    assert sampler_from_config(config) == sampler
    _check(sampler, config, source=getattr(diffusers, SAMPLERS[sampler].scheduler))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_is_the_default_of_its_scheduler(sampler: str) -> None:
    config = json.loads(
        scheduler_from_sampler(sampler, {**STABLE_DIFFUSION, "timestep_spacing": "trailing"}).to_json_string()
    )
    found, expected = SAMPLERS[sampler_from_config(config)], SAMPLERS[sampler]
    assert (found.scheduler, found.settings) == (expected.scheduler, expected.settings)
    assert NoiseSchedule.from_config(config).timestep_spacing == "trailing"


def test_other_schedulers_get_dpmpp_2m() -> None:
    for name in ("LMSDiscreteScheduler", "DDPMScheduler", None):
        assert sampler_from_config({"_class_name": name}) == "dpmpp_2m"
        assert sampler_from_config({"_class_name": name, "use_karras_sigmas": True}) == "dpmpp_2m_karras"
    assert (
        sampler_from_config({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}) == "dpmpp_2m_karras"
    )
    assert sampler_from_config({}) == "dpmpp_2m"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_bundled_checkpoint_matches_diffusers(sampler: str) -> None:
    folder = Path(__file__).parents[2] / "model_store" / "checkpoints" / "tiny-emoji" / "scheduler"
    _check(sampler, json.loads((folder / "scheduler_config.json").read_text()))


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("sampler", ["euler", "euler_a"])
def test_prediction_types_agree(sampler: str, zero_snr: bool) -> None:
    """One model, its noise prediction told as noise, as v and as image, gives one image."""
    config = {**STABLE_DIFFUSION, "timestep_spacing": "trailing", "rescale_betas_zero_snr": zero_snr}

    def latents(prediction_type: str) -> NDArray[np.float32]:
        table = trajectory(NoiseSchedule.from_config({**config, "prediction_type": prediction_type}), sampler, 20)
        alphas = dict(zip(table.timesteps.tolist(), table.input_scale.tolist(), strict=True))

        def model(sample: NDArray[np.float32], timestep: float) -> NDArray[np.float32]:
            alpha, eps = alphas[timestep], MODEL(sample, timestep)
            sigma = np.sqrt(1 - alpha**2)
            x0 = (sample - sigma * eps.astype(np.float64)) / alpha
            outputs = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}
            return outputs[prediction_type].astype(np.float32)

        return _latents(table, model=model)

    expected = latents("epsilon")
    for prediction_type in ("v_prediction", "sample"):
        np.testing.assert_allclose(latents(prediction_type), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Rows at different steps of different samplers, in one call and one by one: the same to the last bit."""
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    random = np.random.default_rng(0)
    rows = [
        (trajectory(schedule, sampler, steps), i) for sampler in SAMPLERS for steps, i in ((4, 0), (7, 3), (20, 19))
    ]
    states = [random.standard_normal((table.slots, *SHAPE), np.float32) for table, _ in rows]
    output, noise = (random.standard_normal((len(rows), *SHAPE), np.float32) for _ in range(2))
    output[1] = np.nan  # nor does a row that went wrong touch the others
    updates = [table.update[i] for table, i in rows]
    together = advance(states, output, noise, updates)
    for row in range(len(rows)):
        only = slice(row, row + 1)
        [alone] = advance(states[only], output[only], noise[only], updates[only])
        assert together[row].dtype == np.float32
        assert together[row].shape == states[row].shape
        np.testing.assert_array_equal(together[row], alone)
        assert np.isfinite(together[row]).all() == (row != 1)


@pytest.mark.parametrize("skip_prk_steps", [True, False])
def test_heun_and_pndm_evaluate_more_than_once_a_step(skip_prk_steps: bool) -> None:
    schedule = NoiseSchedule.from_config({**STABLE_DIFFUSION, "skip_prk_steps": skip_prk_steps})
    assert trajectory(schedule, "heun", 4).steps_done.tolist() == [0, 1, 1, 2, 2, 3, 4]
    pndm = [0, 1, 2, 3, 4] if skip_prk_steps else [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 4]
    assert trajectory(schedule, "pndm", 4).steps_done.tolist() == pndm


@pytest.mark.parametrize("skip_prk_steps", [True, False])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_tables_of_many_lengths_are_sound(sampler: str, spacing: str, skip_prk_steps: bool) -> None:
    if not skip_prk_steps and sampler != "pndm":
        return
    config = {**STABLE_DIFFUSION, "timestep_spacing": spacing, "skip_prk_steps": skip_prk_steps}
    schedule = NoiseSchedule.from_config(config)
    for steps in (*range(1, 10), 15, 28, 49, 50, 51, 999):
        if _refusal(sampler, config, steps):
            continue
        if (spacing, steps) == ("leading", 999) and sampler.startswith(("dpmpp", "unipc")):
            continue  # refused: see below
        table = trajectory(schedule, sampler, steps)
        slots, n = table.slots, table.evaluations
        if sampler in SLOTS:
            assert slots == SLOTS[sampler] + (0 if skip_prk_steps else 2)
            more = {"heun": steps - 1, "pndm": (steps > 1) if skip_prk_steps else 9}
            assert n == steps + more.get(sampler, 0)
            assert table.draws_noise.any() == (sampler in DRAW_NOISE and steps > 1)
        assert table.sampler == sampler
        assert table.steps == steps  # also 49, where diffusers' trailing spacing gives 50
        assert table.timesteps.shape == table.input_scale.shape == table.draws_noise.shape == (n,)
        assert table.update.shape == (n, slots, slots + 2)
        assert table.steps_done[-1] == steps
        assert set(np.diff(table.steps_done, prepend=0).tolist()) <= {0, 1}
        assert (np.diff(table.timesteps) <= 0).all()
        assert table.timesteps.min() >= 0
        assert table.timesteps.max() <= 999
        assert np.isfinite(table.update).all()
        np.testing.assert_array_equal(table.draws_noise, table.update[:, :, -1].any(axis=1))


def test_tables_are_shared_and_cannot_be_changed() -> None:
    schedule = NoiseSchedule.from_config({})
    table = trajectory(schedule, "euler", 5)
    assert trajectory(NoiseSchedule.from_config({}), "euler", 5) is table
    with pytest.raises(ValueError, match="read-only"):
        table.update[0] = 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("thresholding", True),
        ("use_beta_sigmas", True),
        ("solver_type", "heun"),
        ("predict_x0", False),
        ("disable_corrector", [0]),
        ("skip_prk_steps", 1),
        ("original_inference_steps", 0),
        ("original_inference_steps", "50"),
        ("timestep_scaling", 0),
        ("solver_order", 3),
        ("interpolation_type", "log_linear"),
        ("timestep_type", "continuous"),
        ("lambda_min_clipped", -5.1),
        ("beta_schedule", "laplace"),
        ("prediction_type", "flow_prediction"),
        ("timestep_spacing", "random"),
        ("final_sigmas_type", "one"),
        ("trained_betas", [0.1, 0.2]),
        ("trained_betas", 5),
        ("trained_betas", ["a"]),
        ("num_train_timesteps", 1),
        ("num_train_timesteps", 100_001),
        ("steps_offset", 1000),
        ("num_train_timesteps", 10.5),
        ("num_train_timesteps", None),
        ("beta_start", "0.1"),
        ("beta_end", float("nan")),
        ("steps_offset", -1),
        ("set_alpha_to_one", "false"),
    ],
)
def test_settings_that_are_not_implemented_are_named(name: str, value: object) -> None:
    with pytest.raises(BundleError, match=name):
        NoiseSchedule.from_config({**STABLE_DIFFUSION, name: value})


@pytest.mark.parametrize(("name", "value"), [("beta_start", -0.1), ("beta_end", 1.0), ("beta_end", 1e308)])
def test_betas_are_shares(name: str, value: float) -> None:
    with pytest.raises(BundleError, match=r"betas from .* they must be from 0 to less than 1"):
        NoiseSchedule.from_config({**STABLE_DIFFUSION, name: value})


def test_settings_that_change_nothing_are_accepted() -> None:
    config = {
        **STABLE_DIFFUSION,
        "clip_sample": True,
        "lambda_min_clipped": None,
        "sigma_min": None,
        "disable_corrector": [],
        "interpolation_type": "linear",
    }
    assert NoiseSchedule.from_config(config) == NoiseSchedule.from_config(STABLE_DIFFUSION)


def test_unknown_sampler_names_the_known_ones() -> None:
    with pytest.raises(InvalidRequest, match=", ".join(SAMPLERS)):
        trajectory(NoiseSchedule(), "plms", 20)


@pytest.mark.parametrize("steps", [0, -1, 1000, 10**9])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(InvalidRequest, match="1 to 999"):
        trajectory(NoiseSchedule(), "ddim", steps)


def test_steps_beyond_the_last_timestep_are_refused() -> None:
    schedule = NoiseSchedule.from_config({**STABLE_DIFFUSION, "timestep_spacing": "leading"})
    with pytest.raises(InvalidRequest, match="Ask for fewer steps"):
        trajectory(schedule, "dpmpp_2m", 999)


def test_import_loads_no_torch() -> None:
    code = "import sys, diffuserve.samplers, diffuserve.samplers.noise, diffuserve.text.tokenizer; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "diffusers", "transformers", "onnxruntime"} & set(loaded)
