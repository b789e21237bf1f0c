"""Both stages from end to end, in seconds: that they learn, repeat, resume, and leave a checkpoint that is served."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffuserve_training.config import ConfigError, Training
from diffuserve_training.dataset import Icons
from diffuserve_training.stages import train_decoder, train_ldm, train_vae
from tests.training.drawings import small_training, some_icons

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice about data loaders and logs


@pytest.fixture(scope="module")
def icons(tmp_path_factory: pytest.TempPathFactory) -> Icons:
    return some_icons(tmp_path_factory.mktemp("icons"))


@pytest.fixture(scope="module")
def trained(icons: Icons, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages, four steps each."""
    folder = tmp_path_factory.mktemp("trained")
    run(small_training(), icons, folder)
    return folder


def run(training: Training, icons: Icons, folder: Path) -> None:
    train_vae(training, icons, folder)
    train_ldm(training, icons, folder)


def weights(folder: Path, stage: str = "ldm") -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / f"{stage}-run" / "last.ckpt", weights_only=True)["state_dict"]
    return state


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    icons: Icons, trained: Path, tmp_path: Path
) -> None:
    run(small_training(), icons, tmp_path / "again")
    assert same(weights(trained), weights(tmp_path / "again"))
    run(small_training(seed=1), icons, tmp_path / "other")
    assert not same(weights(trained), weights(tmp_path / "other"))


def test_a_run_that_was_stopped_ends_where_an_unbroken_one_does(icons: Icons, trained: Path, tmp_path: Path) -> None:
    for steps in (2, 4):
        train_vae(small_training(steps=steps), icons, tmp_path)
        assert same(weights(trained, "vae"), weights(tmp_path, "vae")) == (steps == 4)
    for steps in (2, 4):  # on the finished autoencoder, as the unbroken run was
        train_ldm(small_training(steps=steps), icons, tmp_path)
        assert same(weights(trained), weights(tmp_path)) == (steps == 4)


def test_a_stage_does_not_go_on_with_another_trainings_run(icons: Icons, trained: Path, tmp_path: Path) -> None:
    fewer = Icons(icons.icons[:-1], icons.drawn[:-1])
    for training, some in ((small_training(seed=1), icons), (small_training(), fewer)):
        with pytest.raises(ConfigError, match=r"another training's run.* remove .*vae-run"):
            train_vae(training, some, trained)
        with pytest.raises(ConfigError, match=r"another training's run.* remove .*ldm-run"):
            train_ldm(training, some, trained)
    shutil.copytree(trained / "vae", tmp_path / "vae")
    train_decoder(small_training(steps=1), icons, tmp_path)
    train_decoder(small_training(steps=2), icons, tmp_path)
    vae = load_file(file := tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    vae["encoder.conv_in.bias"][0] += 1  # stage one made anew
    save_file(vae, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"another training's run.* remove .*decoder-run"):
        train_decoder(small_training(steps=2), icons, tmp_path)


def test_the_decoder_learns_alone_and_latents_stay(icons: Icons, trained: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    shutil.copytree(trained / "vae", tmp_path / "vae")
    train_decoder(small_training(), icons, tmp_path)
    before, after = (AutoencoderKL.from_pretrained(folder / "vae") for folder in (trained, tmp_path))
    for name, weight in before.state_dict().items():
        learns = name.startswith(("decoder.", "post_quant_conv."))
        assert torch.equal(weight, after.state_dict()[name]) != learns, name
    assert before.config.scaling_factor == after.config.scaling_factor


def test_a_checkpoint_can_be_gone_on_from(icons: Icons, trained: Path, tmp_path: Path) -> None:
    def largest_change(folder: Path) -> float:
        file = Path("checkpoint", "unet", "diffusion_pytorch_model.safetensors")
        before, after = load_file(trained / file), load_file(folder / file)
        return max(float((before[name] - after[name]).abs().max()) for name in before)

    start = trained / "checkpoint"
    slow = small_training(steps=1, learning_rate=1e-6, matrix_learning_rate=1e-6)
    train_ldm(slow, icons, tmp_path / "on", start=start)
    assert largest_change(tmp_path / "on") < 1e-3
    train_decoder(small_training(), icons, tmp_path / "on", start=start)
    one, other = (
        load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
        for folder in (start, tmp_path / "on" / "checkpoint")
    )
    assert one.keys() == other.keys()
    assert {tensor.dtype for tensor in other.values()} == {torch.float16}
    assert not torch.equal(one["decoder.conv_in.weight"], other["decoder.conv_in.weight"])
    assert torch.equal(one["encoder.conv_in.weight"], other["encoder.conv_in.weight"])
    for config in tmp_path.glob("on/checkpoint/*/config.json"):
        assert str(tmp_path.parent) not in config.read_text()


def test_what_is_left_is_a_checkpoint_of_half_precision_that_draws(trained: Path) -> None:
    from diffuserve_training.sampling import draw, load_pipeline

    checkpoint = trained / "checkpoint"
    for component in ("unet", "vae"):
        tensors = load_file(checkpoint / component / "diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert not list(checkpoint.rglob("*.bin"))
    images = draw(
        load_pipeline(checkpoint), ["circle, flat, on a red background"] * 2, [0, 1], steps=2, guidance_scale=3
    )
    assert images.shape == (2, 64, 64, 3)
    assert (images[0] != images[1]).any()
    assert (trained / "ldm.png").is_file()
    assert (trained / "vae.png").is_file()


def test_a_checkpoint_is_evaluated_on_what_is_asked_for(icons: Icons, trained: Path) -> None:
    from diffuserve_training.cases import SHARES
    from diffuserve_training.evaluate import evaluate

    data = small_training().data
    figures, images, cases = evaluate(trained / "checkpoint", icons, data, 12, styles=("flat",))
    assert images.shape == (12, 64, 64, 3)
    assert {icons.icons[thing.icon].style for case in cases for thing in case.description.things} == {"flat"}
    assert sum(figures.named[group].count for group in SHARES) == figures.aspects["style"].count == 12
    assert 0 < figures.aspects["place"].count < 12
    assert figures.vae_psnr_db > 0
    assert figures.lora is None


def test_a_training_may_have_a_time_instead_of_steps(icons: Icons, trained: Path, tmp_path: Path) -> None:
    """However many steps that are, its checkpoint is there in the end."""
    shutil.copytree(trained / "vae", tmp_path / "vae")
    train_ldm(small_training(steps=10_000), icons, tmp_path, seconds=0.5)
    assert (tmp_path / "checkpoint" / "model_index.json").is_file()
    assert (tmp_path / "ldm.png").is_file()
    assert not (tmp_path / "ldm-run" / "last.ckpt").exists()


def test_it_learns(icons: Icons, trained: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    from diffuserve_training.evaluate import vae_psnr_db

    train_vae(small_training(steps=60, every=60, ema_decay=0.9, learning_rate=4e-3), icons, tmp_path)
    after_4, after_60 = (
        vae_psnr_db(AutoencoderKL.from_pretrained(folder / "vae"), icons, small_training().data)
        for folder in (trained, tmp_path)
    )
    assert after_60 > after_4 + 1
