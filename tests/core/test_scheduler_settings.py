"""Every setting of diffusers' schedulers is known, and those that are called harmless are."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest

from diffuserve.errors import BundleError, CheckpointError
from diffuserve.samplers import SAMPLERS
from diffuserve.samplers.noise_schedule import NoiseSchedule
from diffuserve.samplers.scheduler_settings import HARMLESS, IMPLEMENTED, check_known
from diffuserve_export.checkpoint.checkpoint import open_checkpoint
from tests.core.test_samplers import STABLE_DIFFUSION, _check
from tests.export.tiny import write_checkpoint

USED = {field.name for field in dataclasses.fields(NoiseSchedule)}
# That people have as a checkpoint's scheduler, whose noise is that of a beta schedule.
SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose scheduler each test replaces."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


def test_each_setting_is_in_one_table() -> None:
    for one, other in ((USED, HARMLESS), (IMPLEMENTED, HARMLESS), (IMPLEMENTED.keys() - {"solver_type"}, USED)):
        assert not {*one} & {*other}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_settings_of_diffusers_are_known(name: str) -> None:
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters.keys() - {"self"}
    assert parameters <= USED | IMPLEMENTED.keys() | HARMLESS.keys()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_checkpoint_may_have_any_of_diffusers_schedulers(name: str, checkpoint: Path) -> None:
    """With its own defaults, as training scripts save; -Infinity among them, which is no JSON."""
    scheduler = getattr(diffusers, name)(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.save_pretrained(checkpoint / "scheduler")
    index = json.loads((checkpoint / "model_index.json").read_text())
    (checkpoint / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", name]}))
    opened = open_checkpoint(checkpoint)
    assert opened.spec.default_sampler in SAMPLERS
    schedule = NoiseSchedule.from_config(opened.configs["scheduler"])
    assert (schedule.beta_start, schedule.beta_end, schedule.beta_schedule) == (0.00085, 0.012, "scaled_linear")


@pytest.mark.parametrize(
    "name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CMStochasticIterativeScheduler"]
)
def test_schedulers_with_other_noise_are_refused(name: str, checkpoint: Path) -> None:
    getattr(diffusers, name)().save_pretrained(checkpoint / "scheduler")
    with pytest.raises(CheckpointError, match=f"{name} has no beta schedule"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "settings",
    [
        {"variance_type": "fixed_small", "clip_sample": False, "_class_name": "DDPMScheduler"},
        {"variance_type": "fixed_large_log"},
        {"algorithm_type": "dpmsolver"},
        {"algorithm_type": "data_prediction", "predictor_order": 3, "corrector_order": 4, "tau_func": None},
        {"flow_shift": 3.0, "time_shift_type": "exponential"},
        {"dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0, "clip_sample_range": 3.0},
        {"predict_epsilon": True, "tensor_format": "pt"},
    ],
)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_settings_that_change_no_image(sampler: str, settings: dict[str, Any]) -> None:
    """Against diffusers' class of the sampler, made from the same settings."""
    config = {**STABLE_DIFFUSION, **settings}
    check_known(config, USED)
    assert NoiseSchedule.from_config(config) == NoiseSchedule.from_config(STABLE_DIFFUSION)
    _check(sampler, config, steps=(6,))


@pytest.mark.parametrize("value", ["learned", "learned_range"])
def test_variances_that_the_unet_predicts_are_refused(value: str) -> None:
    with pytest.raises(BundleError, match=f"variance_type='{value}'.*may be 'fixed_small'"):
        NoiseSchedule.from_config({**STABLE_DIFFUSION, "variance_type": value})


def test_unknown_settings_are_refused_unless_they_are_off() -> None:
    check_known({**STABLE_DIFFUSION, "_class_name": "X", "_note": 1, "use_octaves": False, "octaves": None}, USED)
    for value in (3.0, True, "x", [1]):
        with pytest.raises(BundleError, match=r"octaves=.*which no scheduler known here has"):
            check_known({**STABLE_DIFFUSION, "octaves": value}, USED)
    for name in ("shift", "base_shift", "sigma_data"):
        with pytest.raises(BundleError, match=f"{name}=0.5"):
            check_known({**STABLE_DIFFUSION, name: 0.5}, USED)
    with pytest.raises(BundleError, match="predict_epsilon=False"):
        NoiseSchedule.from_config({**STABLE_DIFFUSION, "predict_epsilon": False})
