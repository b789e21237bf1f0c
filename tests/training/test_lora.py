"""A LoRA from a folder of pictures: it changes what is drawn, leaves the checkpoint as it was, and fits an export."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors.torch import load_file, save_file

from diffuserve_training.config import ConfigError, Lora, Optimisation
from diffuserve_training.identity import begin_run
from diffuserve_training.lora_module import adapted, train_lora, write_lora
from diffuserve_training.pictures import read_pictures
from tests.conftest import CHECKPOINT

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice about data loaders and logs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures: captions in a text, in metadata.jsonl, and none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in (("a.png", "red"), ("b.jpg", "green"), ("c.webp", "blue")):
        Image.new("RGB", (150, 100), colour).save(folder / name)
    (folder / "a.txt").write_text("a red wall\n")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "b.jpg", "text": "a lawn"}) + "\n")
    return folder


def test_a_lora_is_learnt_and_loaded_by_diffusers(folder: Path, tmp_path: Path, reference_pipeline: Any) -> None:
    config = Lora(
        checkpoint=str(CHECKPOINT),
        images=str(folder),
        prompt="a wall",
        rank=4,
        alpha=4,
        target_modules=("to_q", "to_out.0", "conv1", "conv_shortcut"),
        optimisation=Optimisation(
            steps=8, batch_size=2, learning_rate=1e-2, matrix_learning_rate=0.1, warmup_steps=0, every=8
        ),
    )
    path = train_lora(config, read_pictures(folder, config.prompt), tmp_path / "run")

    def draw() -> Any:
        [image] = reference_pipeline(
            "a wall", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np"
        ).images
        return image

    before = draw()
    reference_pipeline.load_lora_weights(path)
    try:
        adapted = [
            name for name, module in reference_pipeline.unet.named_modules() if isinstance(module, BaseTunerLayer)
        ]
        assert len(adapted) == len({name for name in load_file(path) if name.endswith("lora_A.weight")}) > 8
        assert {name.rsplit(".", 1)[-1] for name in adapted} == {"to_q", "0", "conv1", "conv_shortcut"}
        with_lora = draw()
    finally:
        reference_pipeline.unload_lora_weights()
    assert np.abs(with_lora - before).max() > 0.02
    assert (draw() == before).all()


def test_a_file_changes_as_much_as_the_training_did_whatever_alpha_is(tmp_path: Path, reference_pipeline: Any) -> None:
    config = Lora(
        checkpoint=str(CHECKPOINT),
        images="",
        rank=4,
        alpha=10,
        target_modules=("to_k", "conv2"),
        optimisation=Optimisation(steps=1, batch_size=1, learning_rate=1e-3),
    )
    unet, generator = copy.deepcopy(reference_pipeline.unet), torch.Generator().manual_seed(0)
    trained = adapted(unet, config)
    for name, weight in trained.named_parameters():
        if ".lora_B." in name:
            weight.data = 0.02 * torch.randn(weight.shape, generator=generator)
    write_lora(trained, config, tmp_path / "lora.safetensors")
    inputs = {
        "sample": torch.randn(2, unet.config.in_channels, 16, 16, generator=generator),
        "timestep": torch.tensor([900, 20]),
        "encoder_hidden_states": torch.randn(2, 24, unet.config.cross_attention_dim, generator=generator),
    }
    with torch.inference_mode():
        learnt, plain = trained(**inputs).sample, reference_pipeline.unet(**inputs).sample
        reference_pipeline.load_lora_weights(tmp_path / "lora.safetensors")
        try:
            loaded = reference_pipeline.unet(**inputs).sample
        finally:
            reference_pipeline.unload_lora_weights()
    assert (learnt - plain).abs().max() > 0.1
    torch.testing.assert_close(loaded, learnt, rtol=0, atol=float(0.01 * (learnt - plain).abs().max()))


def test_a_latent_consistency_model_is_refused(folder: Path, tmp_path: Path, reference_pipeline: Any) -> None:
    shutil.copytree(CHECKPOINT, checkpoint := tmp_path / "lcm")
    shutil.rmtree(checkpoint / "unet")
    unet = reference_pipeline.unet
    type(unet).from_config(unet.config, time_cond_proj_dim=12).save_pretrained(checkpoint / "unet")
    config = Lora(
        checkpoint=str(checkpoint),
        images=str(folder),
        optimisation=Optimisation(steps=1, batch_size=1, learning_rate=1e-3),
    )
    with pytest.raises(ConfigError, match="lcm is a latent consistency model"):
        train_lora(config, read_pictures(folder, "a wall"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_modules_that_are_not_there_are_named(folder: Path, tmp_path: Path) -> None:
    config = Lora(
        checkpoint=str(CHECKPOINT),
        images=str(folder),
        prompt="a wall",
        target_modules=("to_nothing",),
        optimisation=Optimisation(steps=1, batch_size=1, learning_rate=1e-3),
    )
    with pytest.raises(ConfigError, match="target_modules does not fit"):
        train_lora(config, read_pictures(folder, config.prompt), tmp_path)


def test_a_run_goes_on_with_what_it_began_with_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    def config(steps: int) -> Lora:
        return Lora(
            checkpoint=str(CHECKPOINT),
            images=str(folder),
            prompt="a wall",
            size_px=32,
            rank=2,
            alpha=2,
            target_modules=("to_k",),
            optimisation=Optimisation(steps=steps, batch_size=1, learning_rate=1e-2, warmup_steps=0, every=1),
        )

    def train(output: Path, config: Lora, pictures: Path = folder) -> dict[str, torch.Tensor]:
        return load_file(train_lora(config, read_pictures(pictures, config.prompt), output))

    unbroken = train(tmp_path / "unbroken", config(3))
    output = tmp_path / "run"
    train(output, config(2))

    others = []
    for number, change in enumerate(("caption", "picture", "fewer")):
        shutil.copytree(folder, other := tmp_path / f"other-{number}")
        if change == "caption":
            (other / "a.txt").write_text("a red wal")
        elif change == "picture":
            Image.new("RGB", (150, 100), (255, 0, 1)).save(other / "a.png")
        else:
            (other / "c.webp").unlink()
        others.append((config(2), other))
    for changes in ({"prompt": "a lawn"}, {"alpha": 4}, {"empty_captions": 0.2}):
        others.append((msgspec.structs.replace(config(2), **changes), folder))
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, checkpoint)
    weights = load_file(file := checkpoint / "unet" / "diffusion_pytorch_model.safetensors")
    weights["conv_in.bias"][0] += 1
    save_file(weights, file, metadata={"format": "pt"})
    others.append((msgspec.structs.replace(config(2), checkpoint=str(checkpoint)), folder))
    before = (output / "lora.safetensors").read_bytes()
    for other_config, pictures in others:
        with pytest.raises(
            ConfigError, match=r"run holds another training's run: .* or remove .*run/lora-run to begin"
        ):
            train(output, other_config, pictures)
    assert (output / "lora.safetensors").read_bytes() == before

    moved = tmp_path / "moved"  # the same pictures elsewhere are the same training
    shutil.copytree(folder, moved)
    finished = train(output, config(3), moved)
    assert finished.keys() == unbroken.keys()
    assert all(torch.equal(finished[name], unbroken[name]) for name in unbroken)


def test_a_checkpoint_of_a_run_whose_training_is_not_told_is_left_alone(tmp_path: Path) -> None:
    run = begin_run(tmp_path / "lora-run", {"rank": 3}, b"picture")
    (run / "last.ckpt").write_bytes(b"")
    assert begin_run(run, {"rank": 3}, b"picture") == run
    for parts in (({"rank": 3}, b"pictur", b"e"), ({"rank": 3.5}, b"picture"), ()):
        with pytest.raises(ConfigError, match="another training's run"):
            begin_run(run, *parts)
    (run / "training.sha256").unlink()
    with pytest.raises(ConfigError, match="another training's run"):
        begin_run(run, {"rank": 3}, b"picture")
    shutil.rmtree(run)
    assert begin_run(run, {"rank": 4}) == run
