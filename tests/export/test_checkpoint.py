"""What a checkpoint must be, and what is said about those that are not."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from diffuserve.errors import CheckpointError
from diffuserve_export.checkpoint.checkpoint import open_checkpoint
from diffuserve_export.checkpoint.load import model_from_checkpoint
from diffuserve_export.checkpoint.weights import choose_weights
from diffuserve_export.export import bundle_from_checkpoint
from tests.export.tiny import write_sd2_checkpoint, write_sdxl_checkpoint

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def edit(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **values}))


def rewrite(file: Path, change: Callable[[str, NDArray[Any]], NDArray[Any]], **added: NDArray[Any]) -> None:
    """Saves each tensor as `change` makes it of its name and values, and those `added`."""
    changed = {name: change(name, array) for name, array in load_file(file).items()}
    save_file({**changed, **added}, file, metadata={"format": "pt"})


def replace_by_folder(path: Path) -> None:
    (path / "unet/config.json").unlink()
    (path / "unet/config.json").mkdir()


def editing(name: str, **values: Any) -> Callable[[Path], None]:
    return lambda path: edit(path / name, **values)


def pickle_unet(path: Path) -> None:
    (path / UNET_WEIGHTS).rename(path / "unet/diffusion_pytorch_model.bin")


def rename_unet_to_variant(path: Path) -> None:
    (path / UNET_WEIGHTS).rename(path / "unet/diffusion_pytorch_model.non_ema.safetensors")


def remove_vae(path: Path) -> None:
    edit(path / "model_index.json", vae=[None, None])


def cut_unet_short(path: Path) -> None:
    data = (path / UNET_WEIGHTS).read_bytes()
    (path / UNET_WEIGHTS).write_bytes(data[: len(data) // 2])


def garble_unet(path: Path) -> None:
    (path / UNET_WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


def quantise_unet(path: Path) -> None:
    rewrite(path / UNET_WEIGHTS, lambda name, array: array.astype(np.int8))


def point_outside(path: Path) -> None:
    (path / UNET_WEIGHTS).unlink()
    index = {"weight_map": {"conv_in.weight": "../../elsewhere.safetensors"}}
    (path / f"{UNET_WEIGHTS}.index.json").write_text(json.dumps(index))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda path: (path / "model_index.json").unlink(), "not in diffusers' format: it has no model_index"),
    "broken index": (lambda path: (path / "model_index.json").write_text("{"), "model_index.json is damaged"),
    "other pipeline": (
        editing("model_index.json", _class_name="FluxPipeline"),
        "is a FluxPipeline, which is not supported. Supported: StableDiffusionPipeline, .*StableDiffusionXLPipeline",
    ),
    "no pipeline": (
        editing("model_index.json", _class_name=["X"]),
        r"is a \['X'\], which is not supported. Supported:",
    ),
    "half an entry": (
        editing("model_index.json", unet=["diffusers"]),
        "the unet is of the class diffusers. Supported:",
    ),
    "no second text encoder": (
        editing("model_index.json", _class_name="StableDiffusionXLPipeline"),
        "lacks the component text_encoder_2",
    ),
    "own code": (editing("model_index.json", unet=["my_unet", "MyUnet"]), "my_unet.MyUnet.*own code is never run"),
    "other class": (editing("model_index.json", vae=["diffusers", "AutoencoderTiny"]), "Supported: AutoencoderKL"),
    "image encoder": (
        editing("model_index.json", image_encoder=["transformers", "CLIPVisionModelWithProjection"]),
        r"the component image_encoder \(CLIPVision.* not supported",
    ),
    "no vae": (remove_vae, "lacks the component vae"),
    "no config": (lambda path: (path / "unet/config.json").unlink(), "config.json is missing"),
    "folder for config": (replace_by_folder, "config.json cannot be read: Is a directory"),
    "quantised": (quantise_unet, "weights in I8, so they are quantised.*fp32, bf16 or fp16"),
    "pickle": (pickle_unet, "as a pickle.*only safetensors are read.*convert it"),
    "variant": (rename_unet_to_variant, "Found: diffusion_pytorch_model.non_ema.safetensors; rename"),
    "no weights": (lambda path: (path / UNET_WEIGHTS).unlink(), "has no diffusion_pytorch_model.safetensors"),
    "cut short": (cut_unet_short, "is damaged or cut short"),
    "LFS pointer": (garble_unet, "is a git-lfs pointer that stands for the file.* git lfs pull"),
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
    "classes": (editing("unet/config.json", num_class_embeds=10), "num_class_embeds=10"),
    "class projection": (editing("unet/config.json", class_embed_type="projection"), "class_embed_type='projection'"),
    "inpainting": (editing("unet/config.json", in_channels=9), "in_channels=9; it must be 4"),
    "wrong context": (editing("unet/config.json", cross_attention_dim=768), "cross_attention_dim=768; it must be 32"),
    "wrong size": (editing("unet/config.json", sample_size=7), "must be a multiple of 16 pixels"),
    "wrong type": (editing("unet/config.json", sample_size=None), "of the wrong type"),
    "wrong default": (lambda path: (path / "diffuserve.json").write_text('{"stepz": 3}'), "Allowed: steps, guidance"),
    "too many steps": (
        lambda path: (path / "diffuserve.json").write_text('{"steps": 5000}'),
        "--steps .*is 5000; it must be from 1 to 150",
    ),
    "too much guidance": (
        lambda path: (path / "diffuserve.json").write_text('{"guidance_scale": 500}'),
        "--guidance-scale .*is 500.0; it must be from 0 to 50",
    ),
    "unknown sampler": (lambda path: (path / "diffuserve.json").write_text('{"sampler": "x"}'), "Supported: ddim"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str, checkpoint: Path, tmp_path: Path) -> None:
    spoil, message = REFUSED[case]
    spoil(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        bundle_from_checkpoint(checkpoint, tmp_path / "bundles" / "tiny")
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_refuses_what_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"There is no folder .*missing. Give the folder"):
        open_checkpoint(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"There is no file models/missing.SAFETENSORS\.$"):
        open_checkpoint(Path("models/missing.SAFETENSORS"))  # and no id on the hub
    single = tmp_path / "model.ckpt"
    single.write_bytes(pickle.dumps({"state_dict": [1.0] * 100}))
    with pytest.raises(
        CheckpointError, match=r"model.ckpt is a pickle, .* can run any code .* only safetensors are read"
    ):
        open_checkpoint(single)


def swap_weights(path: Path) -> None:
    shutil.copyfile(path / "vae/diffusion_pytorch_model.safetensors", path / "text_encoder/model.safetensors")


def empty_tokenizer(path: Path) -> None:
    (path / "tokenizer/vocab.json").unlink()
    (path / "tokenizer/merges.txt").unlink()


# What is known only once the weights are read, by when there is a folder to write to.
REFUSED_LATE: dict[str, tuple[Callable[[Path], object], str]] = {
    # transformers would fill a missing layer with random numbers.
    "more layers": (
        editing("text_encoder/config.json", num_hidden_layers=2),
        "text_encoder: .* lacks 16 of the weights that the configs describe: encoder.layers.1.layer_norm1.bias",
    ),
    "wider layers": (
        editing("unet/config.json", block_out_channels=[32, 96]),
        r"unet: .*shape .*: down_blocks.1.resnets.0.conv1.bias is \(64,\) where \(96,\) is needed",
    ),
    "more blocks": (
        editing("unet/config.json", layers_per_block=2),
        "unet: .* configs describe: down_blocks.0.attentions.1",
    ),
    "less attention": (
        editing("vae/config.json", mid_block_add_attention=False),
        "vae: .* do not describe 20 of the file's tensors: decoder.mid_block.attentions",
    ),
    "weights of another component": (
        swap_weights,
        "text_encoder: .* of the weights that the configs describe: embeddings",
    ),
    "unknown setting": (editing("unet/config.json", octaves=2), "unet/config.json has octaves=2, which this version"),
    "unknown block": (editing("unet/config.json", down_block_types=["X", "DownBlock2D"]), "unet cannot be loaded: X"),
    "broken vocabulary": (
        lambda path: (path / "tokenizer/vocab.json").write_text("{"),
        "tokenizer cannot be loaded: .*EOF while parsing",
    ),
    "no vocabulary": (empty_tokenizer, "has neither tokenizer.json nor vocab.json"),
}


@pytest.mark.parametrize("case", REFUSED_LATE)
def test_refuses_weights_that_are_not_those_of_the_configs(case: str, checkpoint: Path, tmp_path: Path) -> None:
    spoil, message = REFUSED_LATE[case]
    spoil(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        bundle_from_checkpoint(checkpoint, tmp_path / "bundles" / "tiny")
    assert list((tmp_path / "bundles").iterdir()) == []


def test_a_text_encoder_may_be_shortened_by_its_config(tmp_path: Path) -> None:
    """As some skip its last layers; the file keeps them. But then they must be whole."""
    path = write_sd2_checkpoint(tmp_path / "sd2")
    file = path / "text_encoder/model.safetensors"
    edit(path / "text_encoder/config.json", num_hidden_layers=1)
    model = model_from_checkpoint(open_checkpoint(path))
    assert model.text_encoder.config.num_hidden_layers == 1
    assert not any("layers.1." in name for name in model.text_encoder.state_dict())
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.fc2.bias"))
    save_file({other: array for other, array in tensors.items() if other != name}, file)
    with pytest.raises(CheckpointError, match=r"do not describe 15 of the .*encoder.layers.1.layer_norm1.bias"):
        model_from_checkpoint(open_checkpoint(path))
    save_file({other.replace("layers.1.", "layers.2."): array for other, array in tensors.items()}, file)
    with pytest.raises(CheckpointError, match=r"do not describe 16 of the .*encoder.layers.2.layer_norm1.bias"):
        model_from_checkpoint(open_checkpoint(path))


def test_what_averaged_the_weights_is_no_setting_of_the_model(checkpoint: Path) -> None:
    edit(checkpoint / "unet/config.json", decay=0.9999, optimization_step=1000, power=0.75, octaves=None)
    assert model_from_checkpoint(open_checkpoint(checkpoint)).unet.config["block_out_channels"] == [32, 64]


def test_spec_comes_from_the_configs(shared_checkpoint: Path) -> None:
    spec = open_checkpoint(shared_checkpoint).spec
    assert (spec.name, spec.width, spec.height, spec.vae_scale_factor, spec.size_multiple) == ("tiny", 96, 64, 8, 16)
    assert (spec.latent_channels, spec.hidden_size, spec.max_tokens) == (4, 32, 77)
    assert (spec.default_steps, spec.default_guidance_scale, spec.default_sampler) == (20, 7.5, "ddim")


def test_defaults_come_from_the_checkpoint_or_the_caller(checkpoint: Path) -> None:
    (checkpoint / "diffuserve.json").write_text('{"steps": 8, "guidance_scale": 3, "sampler": "ddim"}')
    spec = open_checkpoint(checkpoint).spec
    assert (spec.default_steps, spec.default_guidance_scale, spec.default_sampler) == (8, 3.0, "ddim")
    spec = open_checkpoint(checkpoint, guidance_scale=5, steps=2, sampler="euler").spec
    assert (spec.default_steps, spec.default_guidance_scale, spec.default_sampler) == (2, 5.0, "euler")


def test_sha256_follows_what_is_read(checkpoint: Path) -> None:
    before = open_checkpoint(checkpoint).sha256
    (checkpoint / "README.md").write_text("not read")
    assert open_checkpoint(checkpoint).sha256 == before
    edit(checkpoint / "vae/config.json", scaling_factor=0.25)
    assert open_checkpoint(checkpoint).sha256 != before


def test_sdxl_components_must_fit(tmp_path: Path) -> None:
    path = write_sdxl_checkpoint(tmp_path / "xl")
    assert not open_checkpoint(path, clip_skip=1).spec.guidance_embedded
    with pytest.raises(CheckpointError, match=r"clip_skip is 2.* from 0 to 1"):
        open_checkpoint(path, clip_skip=2)
    for name, value, message in (
        (
            "text_encoder_2/config.json",
            {"projection_dim": 21},
            "projection_class_embeddings_input_dim=68; it must be 69",
        ),
        ("text_encoder_2/config.json", {"hidden_size": 25}, "cross_attention_dim=56; it must be 57"),
        ("unet/config.json", {"addition_embed_type": "text"}, "addition_embed_type='text'.*supported: 'text_time'"),
        ("scheduler/scheduler_config.json", {"clip_sample": True}, "clip_sample=True"),
    ):
        before = (path / name).read_text()
        edit(path / name, **value)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)
        (path / name).write_text(before)
    edit(path / "model_index.json", force_zeros_for_empty_prompt=False)
    assert not open_checkpoint(path).spec.zero_empty_negative
    edit(path / "text_encoder_2/config.json", intermediate_size=64)
    with pytest.raises(CheckpointError, match="text_encoder_2"):
        model_from_checkpoint(open_checkpoint(path))


def to_fp16(path: Path, *, keep_full: bool) -> None:
    """Saves each component's weights as the fp16 variant."""
    for file in sorted(path.glob("*/*.safetensors")):
        half = {name: array.astype(np.float16) for name, array in load_file(file).items()}
        save_file(half, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        if not keep_full:
            file.unlink()


def test_fp16_variants_are_loaded_as_fp32(checkpoint: Path, shared_checkpoint: Path) -> None:
    import torch

    to_fp16(checkpoint, keep_full=False)
    opened = open_checkpoint(checkpoint)
    assert {weights.variant for weights in opened.weights.values()} == {"fp16"}
    full = open_checkpoint(shared_checkpoint)
    assert opened.parameters == full.parameters
    half, whole = model_from_checkpoint(opened), model_from_checkpoint(full)
    for part in ("text_encoder", "unet", "vae"):
        expected = getattr(whole, part).state_dict()
        for name, weight in getattr(half, part).state_dict().items():
            assert weight.dtype == expected[name].dtype
            torch.testing.assert_close(weight, expected[name].half().to(weight.dtype), rtol=0, atol=0)


def test_full_precision_is_preferred(checkpoint: Path) -> None:
    to_fp16(checkpoint, keep_full=True)
    assert {weights.variant for weights in open_checkpoint(checkpoint).weights.values()} == {None}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.safetensors", "model.fp16.safetensors"], ("model.safetensors", None)),
        (["model.fp16.safetensors", "model.non_ema.safetensors"], ("model.fp16.safetensors", "fp16")),
        (["model.safetensors.index.json", "model.fp16.safetensors"], ("model.safetensors.index.json", None)),
        (["model.safetensors.index.fp16.json"], ("model.safetensors.index.fp16.json", "fp16")),
        (["model.safetensors.fp16.index.json"], ("model.safetensors.fp16.index.json", "fp16")),
        (["Model.SAFETENSORS", "model.fp16.safetensors"], ("Model.SAFETENSORS", None)),
        (["model.bin", "diffusion_pytorch_model.safetensors"], None),
    ],
)
def test_choice_of_weights(names: list[str], expected: tuple[str, str | None] | None) -> None:
    assert choose_weights(names, "model") == expected


def test_parameters_are_counted(shared_checkpoint: Path) -> None:
    opened = open_checkpoint(shared_checkpoint)
    model = model_from_checkpoint(opened)
    parts = (model.text_encoder, model.unet, model.vae)
    assert opened.parameters == sum(weight.numel() for part in parts for weight in part.parameters())
