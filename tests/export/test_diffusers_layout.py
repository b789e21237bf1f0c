"""Weights in folders: names that have changed since, shards by all the names they have had, and what is not the model's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffuserve.errors import CheckpointError
from diffuserve_export.checkpoint.checkpoint import open_checkpoint
from diffuserve_export.checkpoint.load import model_from_checkpoint
from diffuserve_export.checkpoint.loaded_model import LoadedModel
from diffuserve_export.quiet import quiet
from tests.export.single_files import Tensors, make_distinct
from tests.export.tiny import write_sdxl_checkpoint

UNET = "unet/diffusion_pytorch_model"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
Change = Callable[[Tensors], Tensors]


@pytest.fixture
def folder(checkpoint: Path) -> Path:
    return make_distinct(checkpoint)


def rewrite(file: Path, change: Change) -> None:
    tensors = load_file(file)
    changed = change(tensors)
    assert changed.keys() != tensors.keys() or any(changed[name] is not tensors[name] for name in tensors)
    save_file({name: np.ascontiguousarray(array) for name, array in changed.items()}, file, metadata={"format": "pt"})


def load(folder: Path) -> LoadedModel:
    return model_from_checkpoint(open_checkpoint(folder))


def assert_same(model: LoadedModel, other: Any) -> None:
    import torch

    for part in ("unet", "vae", "text_encoder"):
        weights, expected = getattr(model, part).state_dict(), getattr(other, part).state_dict()
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected), part


def with_names(pattern: str, replacement: Any) -> Change:
    return lambda tensors: {re.sub(pattern, replacement, name): array for name, array in tensors.items()}


def with_early_attention(tensors: Tensors) -> Tensors:
    early = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    return with_names(r"(attentions\.0\.)(to_q|to_k|to_v|to_out\.0)", lambda match: match[1] + early[match[2]])(tensors)


def with_the_rest_of_clip(tensors: Tensors) -> Tensors:
    names = ("logit_scale", "text_projection.weight", "visual_projection.weight", "vision_model.post_layernorm.bias")
    positions = {"text_model.embeddings.position_ids": np.arange(77)[None]}
    return {**tensors, **{name: np.ones((3, 3), np.float32) for name in names}, **positions}


@pytest.mark.parametrize(
    ("file", "change"),
    [
        (VAE, with_early_attention),
        (TEXT, with_names("^(text_model.)?", "text_model.")),
        (TEXT, with_names("^(text_model.)?", "")),
        (TEXT, with_the_rest_of_clip),
    ],
)
def test_names_that_mean_the_same(file: str, change: Change, folder: Path) -> None:
    before = load(folder)
    tensors = load_file(folder / file)
    rewrite(folder / file, lambda tensors: {name: array.copy() for name, array in change(tensors).items()})
    assert_same(load(folder), before)
    if change is not with_the_rest_of_clip:
        assert len(load_file(folder / file)) == len(tensors)
    with quiet():  # diffusers reads them so too
        from diffusers import DiffusionPipeline

        assert_same(before, DiffusionPipeline.from_pretrained(folder, local_files_only=True))


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        (".safetensors.index.json", "-{:05}-of-00002.safetensors"),
        (".safetensors.index.fp16.json", ".fp16-{:05}-of-00002.safetensors"),
        (".safetensors.index.fp16.json", "-{:05}-of-00002.fp16.safetensors"),
        (".safetensors.fp16.index.json", "-{:05}-of-00002.fp16.safetensors"),
        (".fp16.safetensors.index.json", ".fp16-{:05}-of-00002.safetensors"),
    ],
)
def test_shards(index: str, shard: str, folder: Path) -> None:
    before = load(folder)
    tensors = load_file(folder / f"{UNET}.safetensors")
    (folder / f"{UNET}.safetensors").unlink()
    names, shards = sorted(tensors), [folder / f"{UNET}{shard.format(number)}" for number in (1, 2)]
    halves = {name: shards[position % 2] for position, name in enumerate(names)}
    for path in shards:
        save_file({name: tensors[name] for name in names if halves[name] == path}, path)
    weight_map = {name: path.name for name, path in halves.items()}
    (folder / f"{UNET}{index}").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    opened = open_checkpoint(folder)
    assert opened.weights["unet"].variant == ("fp16" if "fp16" in index else None)
    assert {file.name for file in opened.weights["unet"].files} == {
        path.name for path in [*shards, folder / f"{UNET}{index}"]
    }
    assert_same(model_from_checkpoint(opened), before)

    rewrite(shards[0], lambda half: {**half, names[1]: tensors[names[1]] + 1})
    with pytest.raises(CheckpointError, match=f"has {names[1]}, and so has another shard"):
        open_checkpoint(folder)
    rewrite(shards[0], lambda half: {name: array for name, array in half.items() if name not in names[:2]})
    with pytest.raises(CheckpointError, match=f"lacks 1 of the weights that the configs describe: {names[0]}. "):
        load(folder)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"{shards[1].name} is missing, and .*json names it"):
        open_checkpoint(folder)


def adding(name: str, value: Any = 1.0) -> Change:
    return lambda tensors: {**tensors, name: np.asarray(value)}


_CONV = "decoder.conv_out.weight"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            f"{UNET}.safetensors",
            adding("encoder_hid_proj.weight"),
            "unet: .* do not describe .*: encoder_hid_proj.weight",
        ),
        (VAE, adding("encoder.mid_block.attentions.0.query.bias"), "attentions.0.query.bias"),  # to_q.bias is there too
        (VAE, adding("vision_model.post_layernorm.bias"), "vision_model.post_layernorm.bias"),
        (TEXT, adding("text_model.final_layer_norm.extra"), "text_model.final_layer_norm.extra"),
        (TEXT, adding("text_model.final_layer_norm.bias"), r"not describe .*: (text_model\.)?final_layer_norm.bias"),
        (VAE, lambda tensors: {**tensors, _CONV: tensors[_CONV].astype(np.int16)}, f"{_CONV} is I16"),
        (VAE, lambda tensors: {**tensors, _CONV: tensors[_CONV].astype(np.uint8)}, f"in U8, .*: {_CONV}"),
        (VAE, lambda tensors: {**tensors, _CONV: tensors[_CONV] * np.nan}, f"{VAE}: {_CONV} holds NaN"),
        (VAE, adding(_CONV.replace("weight", "weight_scale")), "scales .*: decoder.conv_out.weight_scale"),
    ],
)
def test_refuses(file: str, change: Change, message: str, folder: Path) -> None:
    rewrite(folder / file, change)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_the_second_text_encoder_needs_its_projection(tmp_path: Path) -> None:
    folder = write_sdxl_checkpoint(tmp_path / "xl")
    rewrite(folder / "text_encoder_2/model.safetensors", with_the_rest_of_clip)  # another shape
    with pytest.raises(CheckpointError, match=r"text_encoder_2: .*text_projection.weight is \(3, 3\) where \(20, 24\)"):
        load(folder)
    rewrite(
        folder / "text_encoder_2/model.safetensors",
        lambda tensors: {name: array for name, array in tensors.items() if name != "text_projection.weight"},
    )
    with pytest.raises(CheckpointError, match=r"text_encoder_2: .*configs describe: text_projection.weight\. "):
        load(folder)
