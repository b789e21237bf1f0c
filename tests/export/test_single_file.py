"""Checkpoints as one .safetensors file in the original layout: which names are read, and that none is passed over."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from diffuserve.errors import CheckpointError
from diffuserve_export.checkpoint.checkpoint import open_checkpoint
from diffuserve_export.checkpoint.load import model_from_checkpoint
from diffuserve_export.checkpoint.loaded_model import LoadedModel
from tests.export.original_layout import original_tensors
from tests.export.single_files import SingleFile, Tensors, make_single_file
from tests.export.tiny import WRITERS

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def single_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SingleFile]:
    return {family: make_single_file(family, tmp_path_factory.mktemp(family)) for family in WRITERS}


def assert_holds(model: LoadedModel, tensors: Tensors) -> None:
    """The model's weights, written back into the original layout, are these."""
    held = original_tensors(model)
    assert held.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(held[name].numpy(), array.astype(np.float32), err_msg=name)


@pytest.mark.parametrize("family", WRITERS)
def test_weights_are_those_that_diffusers_loads(family: str, single_files: dict[str, SingleFile]) -> None:
    import diffusers
    import torch

    files = single_files[family]
    opened = open_checkpoint(files.path, config=files.configs)
    assert opened.spec.name == "my model"
    assert opened.tensors == open_checkpoint(files.folder).tensors
    model = model_from_checkpoint(opened)
    assert_holds(model, files.tensors)
    pipelines = [diffusers.DiffusionPipeline.from_pretrained(files.folder, local_files_only=True)]
    if family != "lcm":  # diffusers leaves the layer for the guidance scale out of single files
        pipelines += [type(pipelines[0]).from_single_file(files.path, config=str(files.configs), local_files_only=True)]
    for pipeline in pipelines:
        for part in PARTS:
            expected = getattr(pipeline, part, None)
            if expected is None:
                assert getattr(model, part) is None
                continue
            weights = getattr(model, part).state_dict()
            assert weights.keys() == expected.state_dict().keys()
            for name, weight in expected.state_dict().items():
                assert torch.equal(weights[name], weight), f"{part}.{name}"


def renaming(old: str, new: str) -> Callable[[Tensors], Tensors]:
    def rename(tensors: Tensors) -> Tensors:
        renamed = {name.replace(old, new): array for name, array in tensors.items()}
        assert renamed.keys() != tensors.keys()
        return renamed

    return rename


def adding(*names: str, value: Any = 0.5) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, **{name: np.asarray(value) for name in names}}


def with_average(tensors: Tensors) -> Tensors:
    """Of the UNet's weights, as its training keeps it; the names have no dots there."""
    unet = {name: array for name, array in tensors.items() if name.startswith("model.")}
    average = {"model_ema." + name.removeprefix("model.").replace(".", ""): array / 2 for name, array in unet.items()}
    counters = {"model_ema.decay": np.float32(0.9999), "model_ema.num_updates": np.int32(470000)}
    return {**tensors, **average, **{name: np.asarray(value) for name, value in counters.items()}}


def attention_by_matrices(tensors: Tensors) -> Tensors:
    return {
        name: array[:, :, 0, 0] if ".attn_1." in name and array.ndim == 4 else array for name, array in tensors.items()
    }


def another_layer(tensors: Tensors) -> Tensors:
    """OpenCLIP's last, which Stable Diffusion 2 does not use."""
    before = [name for name in tensors if ".resblocks.1." in name]
    last = {name.replace(".resblocks.1.", ".resblocks.2."): tensors[name] + 1 for name in before}
    assert len(last) == 12
    return {**tensors, **last}


def untransposed(tensors: Tensors) -> Tensors:
    """transformers' layout of the projection under OpenCLIP's name."""
    name = "conditioner.embedders.1.model.text_projection"
    return {**{other: array for other, array in tensors.items() if other != name}, f"{name}.weight": tensors[name].T}


SAME: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "early names of CLIP": ("sd1", renaming("transformer.text_model.", "transformer.")),
    "moving average": ("sd1", with_average),
    "position ids": (
        "sd1",
        adding("cond_stage_model.transformer.text_model.embeddings.position_ids", value=np.arange(77)[None]),
    ),
    "noise schedule": (
        "sd1",
        adding("betas", "alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "posterior_mean_coef2", "lvlb_weights"),
    ),
    "loss of the autoencoder": ("sd1", adding("first_stage_model.loss.logvar", "first_stage_model.loss.d.main.0.bias")),
    "halves of CLIP": (
        "sd1",
        adding("cond_stage_model.logit_scale", "cond_stage_model.transformer.text_projection.weight"),
    ),
    "attention by matrices": ("sd1", attention_by_matrices),
    "short name of the autoencoder": ("sd2", renaming("first_stage_model.", "vae.")),
    "names of SD-Turbo": ("sd2", renaming("cond_stage_model.", "conditioner.embedders.0.")),
    "one more layer": ("sd2", another_layer),
    "rest of OpenCLIP": ("sd2", adding("cond_stage_model.model.logit_scale", "cond_stage_model.model.text_projection")),
    "sigmas": ("sdxl", adding("denoiser.sigmas", "conditioner.embedders.1.model.logit_scale")),
    "projection of the first": ("sdxl", adding("conditioner.embedders.0.transformer.text_projection.weight")),
    "projection not transposed": ("sdxl", untransposed),
}


@pytest.mark.parametrize("case", SAME)
def test_other_names_and_what_lies_beside(case: str, single_files: dict[str, SingleFile], tmp_path: Path) -> None:
    family, change = SAME[case]
    files = single_files[family]
    assert_holds(files.load(change(files.tensors), tmp_path / "other.safetensors"), files.tensors)


_Q = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"
_TEXT = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
_FUSED = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"


def without(*beginnings: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: array for name, array in tensors.items() if not name.startswith(beginnings)}


def changing(name: str, change: Callable[[Any], Any]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: change(tensors[name])}


def with_not_a_number(array: Any) -> Any:
    array = array.copy()
    array.flat[7] = np.nan
    return array


REFUSED: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "missing": (
        "sd1",
        without("model.diffusion_model.out.2.bias"),
        r"lacks 1 of the weights that the configs describe: .*\.out\.2\.bias\. ",
    ),
    "missing in CLIP": ("sd1", without(_TEXT), f"configs describe: {_TEXT}. "),
    "unknown": (
        "sd1",
        adding("model.diffusion_model.middle_block.3.bias"),
        "do not describe .*: .*middle_block.3.bias",
    ),
    "by two names": (
        "sd1",
        adding(_TEXT.replace("text_model.", "")),
        "cond_stage_model.transformer.final_layer_norm.bias",
    ),
    "two autoencoders": ("sd1", adding("vae.quant_conv.bias"), "do not describe .*: vae.quant_conv.bias"),
    "average of nothing": ("sd1", adding("model_ema.diffusion_modelheadweight"), "diffusion_modelheadweight"),
    "average alone": (
        "sd1",
        lambda tensors: without("model.")(with_average(tensors)),
        r"holds no UNet \(model.diffusion_model\)",
    ),
    "no text encoder": ("sd1", without("cond_stage_model."), "holds no text encoder"),
    "half a text encoder": (
        "sdxl",
        without("conditioner.embedders.1."),
        "configs describe: conditioner.embedders.1.model.ln_final",
    ),
    "three text encoders": (
        "sdxl",
        adding("conditioner.embedders.2.model.ln_final.bias"),
        "embedders.2.model.ln_final",
    ),
    "another text encoder": (
        "sd1",
        adding("cond_stage_model.model.ln_final.bias"),
        "configs describe: cond_stage_model.model",
    ),
    "bundled embedding": ("sd1", adding("bundle_emb.style.string_to_param.*"), "bundle_emb.style"),
    "part of a layer": (
        "sd2",
        lambda tensors: without("cond_stage_model.model.transformer.resblocks.2.ln_1")(another_layer(tensors)),
        "do not describe 10 of the file's tensors: cond_stage_model.model.transformer.resblocks.2",
    ),
    "layer of another of two": (
        "sdxl",
        adding("conditioner.embedders.1.model.transformer.resblocks.3.ln_1.bias"),
        "resblocks.3.ln_1.bias",
    ),
    "not in thirds": (
        "sdxl",
        changing(_FUSED, lambda array: np.vstack([array, array[:1]])),
        rf"{_FUSED} is \(73, 24\)",
    ),
    "one number": (
        "sdxl",
        changing(_FUSED, lambda array: array[0, :1]),
        rf"{_FUSED} is \(1,\) where three times \(24, 24\) is needed",
    ),
    "not a number": ("sd2", changing(f"{_Q}.weight", with_not_a_number), f"{_Q}.weight holds NaN"),
    "infinity": ("sd2", changing(f"{_Q}.weight", lambda array: array / 0.0), f"{_Q}.weight holds NaN, infinity"),
    "beyond fp32": (
        "sd2",
        changing(f"{_Q}.weight", lambda array: array.astype(np.float64) * 1e40),
        f"{_Q}.weight holds NaN, infinity, or a number beyond fp32",
    ),
    "integers": ("sd1", changing(f"{_Q}.weight", lambda array: array.astype(np.int32)), f"{_Q}.weight is I32"),
    "bytes": ("sd1", changing(f"{_Q}.weight", lambda array: array.astype(np.uint8)), f"in U8, .*: {_Q}.weight. Take"),
    "configuration in bytes": ("sd1", adding(f"{_Q}.comfy_quant", value=np.uint8(0)), f"in U8, .*{_Q}.comfy_quant"),
    "scale of the weight": ("sd1", adding(f"{_Q}.scale_weight"), f"quantised, with scales .*: {_Q}.scale_weight"),
    "scale of the input": ("sd1", adding(f"{_Q}.input_scale"), f"quantised, with scales .*: {_Q}.input_scale"),
    "mark of scales": ("sd1", adding("scaled_fp8"), "quantised, with scales .*: scaled_fp8"),
    "EDM": ("sdxl", adding("edm_mean", "edm_std"), "has edm_mean and edm_std: .*Playground 2.5"),
    "EDM by v": ("sdxl", adding("edm_vpred.sigma_max"), "has edm_vpred.sigma_max: .*not supported"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str, single_files: dict[str, SingleFile], tmp_path: Path) -> None:
    family, change, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message), np.errstate(all="ignore"):
        single_files[family].load(change(single_files[family].tensors), tmp_path / "other.safetensors")


def fp8_e4m3(codes: Any) -> Any:
    """(...) uint8 to float64: a sign, 4 bits of exponent with a bias of 7, 3 of the fraction (arXiv:2209.05433)."""
    sign, exponent, fraction = 1.0 - 2.0 * (codes >> 7), (codes >> 3 & 15).astype(int), (codes & 7) / 8
    return sign * np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7))


def fp8_e5m2(codes: Any) -> Any:
    """(...) uint8 to float64: the upper half of fp16."""
    return (codes.astype(np.uint16) << 8).view(np.float16).astype(np.float64)


def bf16(codes: Any) -> Any:
    """(...) uint16 to float32: the upper half of fp32."""
    return (codes.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize(
    ("dtype", "integer", "decode"),
    [
        ("float8_e4m3fn", "uint8", fp8_e4m3),
        ("float8_e5m2", "uint8", fp8_e5m2),
        ("bfloat16", "uint16", bf16),
        ("float16", "uint16", lambda codes: codes.view(np.float16)),
    ],
)
def test_types_hold_the_weights_themselves(
    dtype: str, integer: str, decode: Callable[[Any], Any], single_files: dict[str, SingleFile], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import save_file as save_torch_file

    files = single_files["sdxl"]
    cast = {name: torch.from_numpy(array).to(getattr(torch, dtype)) for name, array in files.tensors.items()}
    save_torch_file(cast, tmp_path / "cast.safetensors")
    model = model_from_checkpoint(open_checkpoint(tmp_path / "cast.safetensors", config=files.configs))
    assert_holds(model, {name: decode(tensor.view(getattr(torch, integer)).numpy()) for name, tensor in cast.items()})


def test_the_hash_follows_file_and_configs(single_files: dict[str, SingleFile], tmp_path: Path) -> None:
    files = single_files["sd1"]
    before = open_checkpoint(files.path, config=files.configs)
    assert before.file_sha256 == hashlib.sha256(files.path.read_bytes()).hexdigest()
    assert open_checkpoint(files.folder).file_sha256 == ""
    configs = Path(shutil.copytree(files.configs, tmp_path / "configs"))
    assert open_checkpoint(files.path, config=configs).sha256 == before.sha256
    (configs / "diffuserve.json").write_text('{"steps": 4}')
    assert open_checkpoint(files.path, config=configs).sha256 != before.sha256
    name = next(iter(files.tensors))
    save_file({**files.tensors, name: files.tensors[name] + 1}, tmp_path / "my model.safetensors")
    assert open_checkpoint(tmp_path / "my model.safetensors", config=files.configs).sha256 != before.sha256


def test_configs_of_another_kind(single_files: dict[str, SingleFile]) -> None:
    for family, other in (("sd1", "sdxl"), ("sdxl", "sd1"), ("sd2", "sd1"), ("lcm", "sd1")):
        opened = open_checkpoint(single_files[family].path, config=single_files[other].configs)
        with pytest.raises(
            CheckpointError, match=r"my model.safetensors: .*name a folder of the same kind by --config"
        ):
            model_from_checkpoint(opened)


def test_damaged(single_files: dict[str, SingleFile], tmp_path: Path) -> None:
    files = single_files["sd1"]
    (tmp_path / "short.safetensors").write_bytes(files.path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="is damaged or cut short"):
        open_checkpoint(tmp_path / "short.safetensors", config=files.configs)


def test_the_content_decides_what_a_file_is(single_files: dict[str, SingleFile], tmp_path: Path) -> None:
    files = single_files["sd1"]
    for name in ("Model.SAFETENSORS", "model.sft", "model"):
        shutil.copyfile(files.path, tmp_path / name)
        assert_holds(model_from_checkpoint(open_checkpoint(tmp_path / name, config=files.configs)), files.tensors)


def test_config_is_for_single_files_only(single_files: dict[str, SingleFile]) -> None:
    files = single_files["sd1"]
    with pytest.raises(CheckpointError, match=r"--config is for a single \.safetensors file"):
        open_checkpoint(files.folder, config=files.configs)


@pytest.mark.slow
def test_offline_without_configs(single_files: dict[str, SingleFile], tmp_path: Path) -> None:
    """In a process of its own, since the hub's client reads its settings once."""
    code = "from diffuserve.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "export", str(single_files["sd1"].path)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")},
        cwd=tmp_path,
    )
    assert result.returncode != 0
    assert "Its configs and tokenizers would come from stable-diffusion-v1-5/stable-diffusion-v1-5" in result.stderr
    assert "--config FOLDER" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "model_store").exists()
