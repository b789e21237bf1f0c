"""Checkpoints as one .safetensors file in the original layout."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffuserve.errors import CheckpointError
from diffuserve_export.checkpoint import open_checkpoint
from diffuserve_export.load import model_from_checkpoint
from diffuserve_export.quiet import quiet
from diffuserve_export.single_file import config_of_single_file
from tests.export.original_layout import write_single_file
from tests.export.tiny import WRITERS


@dataclass(frozen=True)
class SingleFile:
    """The same weights as one file and as a folder, and that folder without weights."""

    path: Path
    folder: Path
    configs: Path


@pytest.fixture(scope="module")
def single_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SingleFile]:
    return {family: make_single_file(family, tmp_path_factory.mktemp(family)) for family in ("sd1", "sd2", "sdxl")}


def make_single_file(family: str, root: Path) -> SingleFile:
    folder = WRITERS[family](root / "folder")
    with quiet():
        from diffusers import DiffusionPipeline

        pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    path = write_single_file(pipeline, root / "my model.safetensors")
    configs = Path(shutil.copytree(folder, root / "configs", ignore=shutil.ignore_patterns("*.safetensors")))
    return SingleFile(path, folder, configs)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_weights_are_those_of_the_folder(family: str, single_files: dict[str, SingleFile]) -> None:
    import torch

    files = single_files[family]
    opened = open_checkpoint(files.path, config=files.configs)
    folder = open_checkpoint(files.folder)
    assert opened.spec.name == "my model"
    assert opened.tensors == folder.tensors
    single, whole = model_from_checkpoint(opened), model_from_checkpoint(folder)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        expected = getattr(whole, part)
        if expected is None:
            assert getattr(single, part) is None
            continue
        weights = getattr(single, part).state_dict()
        assert weights.keys() == expected.state_dict().keys()
        for name, weight in expected.state_dict().items():
            assert torch.equal(weights[name], weight), f"{part}.{name}"


def test_the_hash_follows_file_and_configs(single_files: dict[str, SingleFile], tmp_path: Path) -> None:
    files = single_files["sd1"]
    before = open_checkpoint(files.path, config=files.configs)
    assert before.file_sha256 == hashlib.sha256(files.path.read_bytes()).hexdigest()
    assert open_checkpoint(files.folder).file_sha256 == ""
    configs = Path(shutil.copytree(files.configs, tmp_path / "configs"))
    assert open_checkpoint(files.path, config=configs).sha256 == before.sha256
    (configs / "diffuserve.json").write_text('{"steps": 4}')
    assert open_checkpoint(files.path, config=configs).sha256 != before.sha256
    tensors = load_file(files.path)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1}, tmp_path / "my model.safetensors")
    assert open_checkpoint(tmp_path / "my model.safetensors", config=files.configs).sha256 != before.sha256


def test_configs_of_another_kind(single_files: dict[str, SingleFile]) -> None:
    for family, other in (("sd1", "sdxl"), ("sdxl", "sd1"), ("sd2", "sd1")):
        opened = open_checkpoint(single_files[family].path, config=single_files[other].configs)
        with pytest.raises(CheckpointError, match=r"my model.safetensors .*name a folder of the same kind by --config"):
            model_from_checkpoint(opened)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.diffusion_model.out.2.bias", "cannot be loaded with the configs"),
        (
            "cond_stage_model.transformer.text_model.final_layer_norm.bias",
            r"lacks 1 of the weights that .*text_encoder.config.json describes: .*final_layer_norm.bias",
        ),
    ],
)
def test_missing_weights(name: str, message: str, single_files: dict[str, SingleFile], tmp_path: Path) -> None:
    files = single_files["sd1"]
    tensors = load_file(files.path)
    del tensors[name]
    save_file(tensors, tmp_path / "cut.safetensors")
    with pytest.raises(CheckpointError, match=rf"cut.safetensors {message}"):
        model_from_checkpoint(open_checkpoint(tmp_path / "cut.safetensors", config=files.configs))


def test_damaged(single_files: dict[str, SingleFile], tmp_path: Path) -> None:
    files = single_files["sd1"]
    (tmp_path / "short.safetensors").write_bytes(files.path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="is damaged or cut short"):
        open_checkpoint(tmp_path / "short.safetensors", config=files.configs)


def test_config_is_for_single_files_only(single_files: dict[str, SingleFile]) -> None:
    files = single_files["sd1"]
    with pytest.raises(CheckpointError, match=r"--config is for a single \.safetensors file"):
        open_checkpoint(files.folder, config=files.configs)


_V2 = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
_XL = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
_FIRST = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({_FIRST: (1, 4), _V2: (1, 768)}, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ({_FIRST: (1, 4), _V2: (1, 1024)}, "stabilityai/stable-diffusion-2-1"),
        ({_FIRST: (1, 4), _XL: (1,)}, "stabilityai/stable-diffusion-xl-base-1.0"),
        ({_FIRST: (1, 9), _V2: (1, 768)}, "takes it for inpainting"),
        ({_FIRST: (1, 4), "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": (1,)}, "xl_refiner"),
        ({"lora_unet_mid_block.lora_up.weight": (1, 4)}, "give a LoRA by --lora"),
    ],
)
def test_whose_configs_are_taken(shapes: dict[str, tuple[int, ...]], expected: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, path)
    try:
        assert config_of_single_file(path) == expected
    except CheckpointError as error:
        assert expected in str(error)


@pytest.mark.slow
def test_offline_without_configs(tmp_path: Path) -> None:
    """In a process of its own, since the hub's client reads its settings once."""
    save_file({_FIRST: np.zeros((1, 4), np.float32)}, tmp_path / "model.safetensors")
    code = "from diffuserve.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "export", str(tmp_path / "model.safetensors")],
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
