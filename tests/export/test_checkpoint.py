"""What a checkpoint must be, and what is said about those that are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffuserve.errors import CheckpointError
from diffuserve_export.checkpoint import open_checkpoint, sha256_of_checkpoint
from diffuserve_export.load import model_from_checkpoint

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def edit(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **values}))


def editing(name: str, **values: Any) -> Callable[[Path], None]:
    return lambda path: edit(path / name, **values)


def pickle_unet(path: Path) -> None:
    (path / UNET_WEIGHTS).rename(path / "unet/diffusion_pytorch_model.bin")


def rename_unet_to_variant(path: Path) -> None:
    (path / UNET_WEIGHTS).rename(path / "unet/diffusion_pytorch_model.fp16.safetensors")


def remove_vae(path: Path) -> None:
    edit(path / "model_index.json", vae=[None, None])


def cut_unet_short(path: Path) -> None:
    data = (path / UNET_WEIGHTS).read_bytes()
    (path / UNET_WEIGHTS).write_bytes(data[: len(data) // 2])


def garble_unet(path: Path) -> None:
    (path / UNET_WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


def point_outside(path: Path) -> None:
    (path / UNET_WEIGHTS).unlink()
    index = {"weight_map": {"conv_in.weight": "../../elsewhere.safetensors"}}
    (path / f"{UNET_WEIGHTS}.index.json").write_text(json.dumps(index))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda path: (path / "model_index.json").unlink(), "not in diffusers' format: it has no model_index"),
    "broken index": (lambda path: (path / "model_index.json").write_text("{"), "model_index.json is damaged"),
    "SDXL": (
        editing("model_index.json", _class_name="StableDiffusionXLPipeline"),
        "is a StableDiffusionXLPipeline, which is not supported. Supported: StableDiffusionPipeline",
    ),
    "own code": (editing("model_index.json", unet=["my_unet", "MyUnet"]), "my_unet.MyUnet.*own code is never run"),
    "other class": (editing("model_index.json", vae=["diffusers", "AutoencoderTiny"]), "Supported: AutoencoderKL"),
    "image encoder": (
        editing("model_index.json", image_encoder=["transformers", "CLIPVisionModelWithProjection"]),
        r"the component image_encoder \(CLIPVision.* not supported",
    ),
    "no vae": (remove_vae, "lacks the component vae"),
    "no config": (lambda path: (path / "unet/config.json").unlink(), "config.json is missing"),
    "pickle": (pickle_unet, "as a pickle.*only safetensors are read.*convert it"),
    "variant": (rename_unet_to_variant, "Found: diffusion_pytorch_model.fp16.safetensors; rename"),
    "no weights": (lambda path: (path / UNET_WEIGHTS).unlink(), "has no diffusion_pytorch_model.safetensors"),
    "cut short": (cut_unet_short, "is damaged or cut short"),
    "LFS pointer": (garble_unet, "is damaged or cut short"),
    "outside": (point_outside, "lies outside its folder"),
    "flow": (editing("scheduler/scheduler_config.json", prediction_type="flow_prediction"), "prediction_type"),
    "thresholding": (editing("scheduler/scheduler_config.json", thresholding=True), "thresholding"),
    "flow matching": (
        lambda path: (path / "scheduler/scheduler_config.json").write_text('{"_class_name": "FlowMatchEuler"}'),
        "FlowMatchEuler has no beta schedule",
    ),
    "added embedding": (
        editing("unet/config.json", addition_embed_type="text_time"),
        "addition_embed_type='text_time'",
    ),
    "guidance embedding": (editing("unet/config.json", time_cond_proj_dim=256), "time_cond_proj_dim=256"),
    "classes": (editing("unet/config.json", num_class_embeds=10), "num_class_embeds=10"),
    "class projection": (editing("unet/config.json", class_embed_type="projection"), "class_embed_type='projection'"),
    "inpainting": (editing("unet/config.json", in_channels=9), "in_channels=9; it must be 4"),
    "wrong context": (editing("unet/config.json", cross_attention_dim=768), "cross_attention_dim=768; it must be 32"),
    "wrong size": (editing("unet/config.json", sample_size=7), "must be a multiple of 16 pixels"),
    "wrong type": (editing("unet/config.json", sample_size=None), "of the wrong type"),
    "wrong default": (lambda path: (path / "diffuserve.json").write_text('{"stepz": 3}'), "Allowed: steps, guidance"),
    "unknown sampler": (lambda path: (path / "diffuserve.json").write_text('{"sampler": "x"}'), "Supported: ddim"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str, checkpoint: Path) -> None:
    spoil, message = REFUSED[case]
    spoil(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(checkpoint)


def test_refuses_what_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"There is no folder .*missing. Give the folder"):
        open_checkpoint(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="download it first: hf download someone/some-model"):
        open_checkpoint(Path("someone/some-model"))
    single = tmp_path / "model.safetensors"
    single.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is a single file.*Convert it: .*from_single_file"):
        open_checkpoint(single)


def test_weights_must_be_those_of_the_config(checkpoint: Path) -> None:
    """transformers would fill a missing layer with random numbers."""
    edit(checkpoint / "text_encoder/config.json", num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"text_encoder.*missing or of another shape"):
        model_from_checkpoint(open_checkpoint(checkpoint))


def test_weights_of_another_shape(checkpoint: Path) -> None:
    edit(checkpoint / "unet/config.json", block_out_channels=[32, 96])
    with pytest.raises(CheckpointError, match="unet"):
        model_from_checkpoint(open_checkpoint(checkpoint))


def test_spec_comes_from_the_configs(shared_checkpoint: Path) -> None:
    spec = open_checkpoint(shared_checkpoint).spec
    assert (spec.name, spec.width, spec.height, spec.vae_scale_factor, spec.size_multiple) == ("tiny", 96, 64, 8, 16)
    assert (spec.latent_channels, spec.hidden_size, spec.max_tokens) == (4, 32, 77)
    assert (spec.default_steps, spec.default_guidance_scale, spec.default_sampler) == (20, 7.5, "ddim")


def test_defaults_come_from_the_checkpoint_or_the_caller(checkpoint: Path) -> None:
    (checkpoint / "diffuserve.json").write_text('{"steps": 8, "guidance_scale": 3, "sampler": "ddim"}')
    spec = open_checkpoint(checkpoint).spec
    assert (spec.default_steps, spec.default_guidance_scale, spec.default_sampler) == (8, 3.0, "ddim")
    assert open_checkpoint(checkpoint, guidance_scale=5).spec.default_guidance_scale == 5


def test_sha256_follows_what_is_read(checkpoint: Path) -> None:
    before = sha256_of_checkpoint(checkpoint)
    (checkpoint / "README.md").write_text("not read")
    assert sha256_of_checkpoint(checkpoint) == before
    edit(checkpoint / "vae/config.json", scaling_factor=0.25)
    assert sha256_of_checkpoint(checkpoint) != before
