"""What a single file says about how to draw with it, which goes before the configs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from safetensors.numpy import save_file

from diffuserve.bundle.manifest import read_manifest
from diffuserve.errors import CheckpointError
from diffuserve.samplers import advance, initial_state, trajectory
from diffuserve.samplers.noise_schedule import NoiseSchedule
from diffuserve_export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from diffuserve_export.checkpoint.load import model_from_checkpoint
from diffuserve_export.checkpoint.safetensors_file import read_header
from diffuserve_export.checkpoint.schedulers import scheduler_from_sampler
from diffuserve_export.checkpoint.single_file import config_of_single_file, said_by_file
from diffuserve_export.export import unchanged_manifest, write_files_beside
from diffuserve_export.export_command import command
from diffuserve_export.quiet import quiet
from tests.export.single_files import SingleFile, make_single_file

V = {"scheduler.prediction_type": "v_prediction"}
ZERO_SNR = {**V, "scheduler.rescale_betas_zero_snr": True}


@pytest.fixture(scope="module")
def single_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SingleFile]:
    """Of configs that predict v, sd2, and that predict epsilon, sdxl."""
    return {family: make_single_file(family, tmp_path_factory.mktemp(family)) for family in ("sd2", "sdxl")}


def mark(files: SingleFile, path: Path, *markers: str, **header: str) -> Path:
    """The file with empty tensors besides, and entries of ModelSpec's in its header."""
    tensors = {**files.tensors, **{name: np.zeros(0, np.float32) for name in markers}}
    save_file(tensors, path, metadata={f"modelspec.{key}": value for key, value in header.items()})
    return path


def open_marked(files: SingleFile, path: Path, *markers: str, **header: str) -> Checkpoint:
    return open_checkpoint(mark(files, path, *markers, **header), config=files.configs)


@pytest.mark.parametrize(
    ("family", "markers", "header", "expected"),
    [
        ("sdxl", (), {}, {}),
        ("sdxl", ("v_pred",), {}, V),
        ("sdxl", ("v_pred", "ztsnr"), {}, ZERO_SNR),
        ("sdxl", ("ztsnr",), {"prediction_type": "v"}, ZERO_SNR),
        ("sdxl", (), {"prediction_type": "v_prediction"}, V),
        ("sdxl", ("v_pred",), {"predict_key": "v", "architecture": "stable-diffusion-xl-v1-base"}, V),
        ("sdxl", (), {"prediction_type": "Epsilon", "predict_key": "epsilon"}, {}),
        ("sdxl", (), {"prediction_type": "None", "encoder_layer": "", "timestep_range": "0, 1000"}, {}),
        ("sdxl", (), {"encoder_layer": "2"}, {}),  # which Stable Diffusion XL takes anyway
        ("sdxl", (), {"encoder_layer": "1"}, {}),
        ("sdxl", (), {"encoder_layer": "0"}, {}),
        ("sdxl", (), {"resolution": "24X41"}, {"unet.sample_size": [20, 12]}),
        ("sdxl", (), {"resolution": "24"}, {"unet.sample_size": [12, 12]}),
        ("sdxl", (), {"encoder_layer": "3"}, {"clip_skip": 1}),
        ("sdxl", (), {"resolution": "24x41"}, {"unet.sample_size": [20, 12]}),
        ("sdxl", (), {"resolution": "16x16"}, {}),
        ("sdxl", (), {"resolution": "1x9"}, {"unet.sample_size": [4, 2]}),
        ("sd2", (), {"architecture": "stable-diffusion-v2-768-v", "timestep_range": "0,999"}, {}),
        ("sd2", ("v_pred",), {"encoder_layer": "2"}, {"clip_skip": 1}),
        ("sd2", ("ztsnr",), {"encoder_layer": "1"}, {"scheduler.rescale_betas_zero_snr": True}),
    ],
)
def test_what_is_taken_from_the_file(
    family: str,
    markers: tuple[str, ...],
    header: dict[str, str],
    expected: dict[str, Any],
    single_files: dict[str, SingleFile],
    tmp_path: Path,
) -> None:
    files = single_files[family]
    plain = open_checkpoint(files.path, config=files.configs)
    opened = open_marked(files, tmp_path / "marked.safetensors", *markers, **header)
    assert opened.taken_from_file == expected
    assert plain.taken_from_file == {}
    scheduler = {key.split(".")[1]: value for key, value in expected.items() if key.startswith("scheduler.")}
    assert opened.configs["scheduler"] == {**plain.configs["scheduler"], **scheduler}
    assert opened.spec.clip_skip == expected.get("clip_skip", 0)
    height, width = expected.get("unet.sample_size", [8, 8])
    assert (opened.spec.height, opened.spec.width) == (2 * height, 2 * width)


@pytest.mark.parametrize(
    ("family", "markers", "header", "message"),
    [
        (
            "sd2",
            (),
            {"prediction_type": "epsilon"},
            r"says that it predicts epsilon \(modelspec.prediction_type in its header\), and the scheduler of .*configs is "
            "for v_prediction. Name configs",
        ),
        ("sd2", (), {"architecture": "stable-diffusion-v2-512"}, "epsilon .modelspec.architecture .* for v_prediction"),
        ("sdxl", (), {"prediction_type": "sample"}, "says that it predicts sample .* is for epsilon"),
        ("sdxl", ("v_pred",), {"prediction_type": "epsilon"}, "predicts v_prediction .the tensor v_pred. and epsilon"),
        ("sdxl", (), {"prediction_type": "flow"}, "modelspec.prediction_type='flow' .*Supported: epsilon"),
        ("sdxl", ("ztsnr",), {}, "has the tensor ztsnr, .* is for epsilon"),
        ("sdxl", (), {"timestep_range": "0,199"}, r"timesteps 0 to 199 only \(modelspec.timestep_range .* 0 to 999"),
        ("sdxl", (), {"timestep_range": "200,999"}, "timesteps 200 to 999 only"),
        ("sdxl", (), {"timestep_range": "all"}, "modelspec.timestep_range='all'"),
        ("sdxl", (), {"encoder_layer": "last"}, "modelspec.encoder_layer='last' .* such as 2"),
        ("sdxl", (), {"resolution": "large"}, "modelspec.resolution='large' .* such as 1024x1024"),
        ("sdxl", (), {"resolution": "9" * 5000}, "modelspec.resolution='999+'"),
        ("sdxl", (), {"resolution": "16x4097"}, "16 x 4097 px .* at most 4096"),
        ("sd2", (), {"encoder_layer": "3"}, "clip_skip is 2"),
        *(
            ("sdxl", (), {"architecture": name}, rf"says that it is a {name.lower()} \(modelspec.architecture")
            for name in (
                "flux-1-dev",
                "Flux.1-dev",
                "stable-diffusion-3-medium",
                "stable-diffusion-v1-inpainting",
                "stable-diffusion-xl-v1-base-inpainting",
                "stable-diffusion-xl-v1-refiner",
                "stable-diffusion-xl-v1-base/lora",
                "stable-diffusion-v1-lora",
                "stable-diffusion-v1/textual-inversion",
                "stable-diffusion-xl-v1-edit",
                "lumina-2",
            )
        ),
    ],
)
def test_refuses(
    family: str,
    markers: tuple[str, ...],
    header: dict[str, str],
    message: str,
    single_files: dict[str, SingleFile],
    tmp_path: Path,
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_marked(single_files[family], tmp_path / "marked.safetensors", *markers, **header)


def test_the_caller_has_the_last_word_on_clip_skip(single_files: dict[str, SingleFile], tmp_path: Path) -> None:
    files = single_files["sdxl"]
    path = mark(files, tmp_path / "marked.safetensors", encoder_layer="3")
    opened = open_checkpoint(path, config=files.configs, clip_skip=0)
    assert (opened.spec.clip_skip, opened.taken_from_file) == (0, {})


_FIRST = "model.diffusion_model.input_blocks.0.0.weight"
_V2 = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
_XL = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
_REFINER = "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias"
_SD3 = "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias"
_TEXT = "cond_stage_model.transformer.text_model.final_layer_norm.bias"


@pytest.mark.parametrize(
    ("shapes", "header", "expected"),
    [
        ({_FIRST: (1, 4), _V2: (1, 768)}, {}, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ({_FIRST: (1, 4), _V2: (1, 1024)}, {}, "stabilityai/stable-diffusion-2-1"),
        ({_FIRST: (1, 4), _V2: (1, 1024)}, {"prediction_type": "v"}, "stabilityai/stable-diffusion-2-1"),
        ({_FIRST: (1, 4), _V2: (1, 1024)}, {"prediction_type": "epsilon"}, "stabilityai/stable-diffusion-2-1-base"),
        ({_FIRST: (1, 4), _XL: (1,)}, {"prediction_type": "epsilon"}, "stabilityai/stable-diffusion-xl-base-1.0"),
        ({_FIRST: (1, 9), _V2: (1, 768)}, {}, "takes it for inpainting"),
        ({_FIRST: (1, 4), _REFINER: (1,)}, {}, "takes it for xl_refiner"),
        ({_FIRST: (1, 4), _SD3: (9216,)}, {}, "takes it for unknown"),
        ({_V2: (1, 768)}, {}, "takes it for v1"),
        ({"lora_unet_mid_block.lora_up.weight": (1, 4)}, {}, "holds no UNet .* Give a LoRA by --lora"),
    ],
)
def test_whose_configs_are_taken(
    shapes: dict[str, tuple[int, ...]], header: dict[str, str], expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    if _FIRST in shapes or _V2 in shapes:
        shapes = {**shapes, _TEXT: (1,), "first_stage_model.quant_conv.bias": (1,)}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, path, metadata={f"modelspec.{key}": value for key, value in header.items()})
    read = read_header(path)
    if "/" in expected:
        assert config_of_single_file(path, read.tensors, said_by_file(path, read)) == expected
    else:
        with pytest.raises(CheckpointError, match=expected):
            config_of_single_file(path, read.tensors, said_by_file(path, read))


def trajectory_of(schedule: NoiseSchedule, sampler: str, steps: int, noise: NDArray[np.float32]) -> NDArray[np.float32]:
    """With a UNet whose output is 0.3 times its input."""
    table = trajectory(schedule, sampler, steps)
    state = initial_state(noise, table)
    for i in range(table.evaluations):
        output = np.float32(0.3 * table.input_scale[i]) * state[0]
        [state] = advance([state], output[None], np.zeros_like(noise)[None], [table.update[i]])
    return state[0]


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
def test_latents_are_those_of_diffusers_schedulers(
    sampler: str, single_files: dict[str, SingleFile], tmp_path: Path
) -> None:
    """Made from the configs' own scheduler with the two settings, as its users are told to."""
    import diffusers
    import torch

    files, steps = single_files["sdxl"], 6
    opened = open_marked(files, tmp_path / "marked.safetensors", "v_pred", "ztsnr")
    noise = np.random.default_rng(0).standard_normal((4, 4, 4), np.float32)
    folder = files.configs / "scheduler"
    own = diffusers.DDIMScheduler.from_pretrained(folder, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    scheduler = scheduler_from_sampler(sampler, own.config)
    scheduler.set_timesteps(steps)
    latents = torch.from_numpy(noise)[None] * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        latents = scheduler.step(0.3 * scheduler.scale_model_input(latents, t), t, latents).prev_sample
    actual = trajectory_of(NoiseSchedule.from_config(opened.configs["scheduler"]), sampler, steps, noise)
    np.testing.assert_allclose(actual, latents[0].numpy(), atol=1e-5 * float(latents.abs().max()))
    plain = NoiseSchedule.from_config(open_checkpoint(files.path, config=files.configs).configs["scheduler"])
    assert np.abs(actual - trajectory_of(plain, sampler, steps, noise)).max() > 0.01


def test_the_bundle_has_the_settings_that_are_used(single_files: dict[str, SingleFile], tmp_path: Path) -> None:
    opened = open_marked(single_files["sdxl"], tmp_path / "marked.safetensors", "v_pred", "ztsnr")
    (tmp_path / "bundle").mkdir()
    write_files_beside(opened, model_from_checkpoint(opened), tmp_path / "bundle")
    written = json.loads((tmp_path / "bundle/scheduler/scheduler_config.json").read_text())
    assert written == opened.configs["scheduler"]
    assert (written["prediction_type"], written["rescale_betas_zero_snr"]) == ("v_prediction", True)


@pytest.mark.slow
def test_images_are_those_of_diffusers(single_files: dict[str, SingleFile], tmp_path: Path) -> None:
    """Exported by the command, against diffusers' pipeline of the folder with the two settings."""
    import diffusers
    import torch

    from tests.export.test_families import draw

    files = single_files["sdxl"]
    path = mark(files, tmp_path / "marked.safetensors", "v_pred", "ztsnr")
    arguments = [path, "--config", files.configs, "--output", tmp_path / "bundle"]
    result = CliRunner().invoke(command, [*map(str, arguments)], catch_exceptions=False)
    assert "scheduler.prediction_type=v_prediction, scheduler.rescale_betas_zero_snr=True" in result.output
    assert read_manifest(tmp_path / "bundle").scheduler["prediction_type"] == "v_prediction"
    with quiet():
        pipeline = diffusers.DiffusionPipeline.from_pretrained(files.folder, local_files_only=True)
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(
            pipeline.scheduler.config, prediction_type="v_prediction", rescale_betas_zero_snr=True
        )
        pipeline.set_progress_bar_config(disable=True)
        fields = {"num_inference_steps": 3, "guidance_scale": 5.0, "width": 24, "height": 16}
        image = pipeline("a cat", generator=torch.Generator().manual_seed(7), **fields).images[0]
    fields = {"steps": 3, "guidance_scale": 5.0, "width": 24, "height": 16, "sampler": "ddim", "seed": 7}
    drawn = draw(tmp_path / "bundle", prompt="a cat", **fields)
    assert np.abs(drawn[0] - np.asarray(image).astype(int)).max() <= 1
    opened = open_checkpoint(path, config=files.configs)
    assert unchanged_manifest(opened, tmp_path / "bundle") is not None
    configs = Path(shutil.copytree(files.configs, tmp_path / "configs"))
    scheduler = {**opened.configs["scheduler"], "beta_end": 0.015, "lambda_min_clipped": float("-inf")}
    (configs / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    assert unchanged_manifest(open_checkpoint(path, config=configs), tmp_path / "bundle") is None
