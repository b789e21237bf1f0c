"""Training data: icons, captions, backgrounds, tokenizer, retrieval."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffuserve_training import train_command
from diffuserve_training.backgrounds import BACKGROUNDS, COLOURS, NAMES, lay_on, nearest_background
from diffuserve_training.captions import caption, plain_caption
from diffuserve_training.config import ConfigError, Data, Training, located, located_checkpoint, read_config, read_names
from diffuserve_training.dataset import Icons, Latents, image_batch, is_held_out
from diffuserve_training.icons import STYLES
from diffuserve_training.packages import FLUENT_FLAT, TrainingDataError, read_json
from diffuserve_training.retrieval import Gallery
from diffuserve_training.tokenizer import sample_captions, tokenizer_from_captions
from tests.training.drawings import some_icons

CONFIGS = Path(__file__).parents[2] / "training" / "configs"


@pytest.fixture(scope="module")
def icons(tmp_path_factory: pytest.TempPathFactory) -> Icons:
    return some_icons(tmp_path_factory.mktemp("icons"))


def test_icons_are_drawn_with_alpha_and_laid_on_colours(icons: Icons) -> None:
    assert icons.drawn.shape == (8, 64, 64, 4)
    assert (icons.drawn[:, 0, 0, 3] == 0).all()
    assert (icons.drawn[:, 32, 32, 3] == 255).all()
    laid = lay_on(icons.drawn[:2], COLOURS[6:8])
    assert laid[0, 0, 0].tolist() == list(BACKGROUNDS[NAMES[6]])
    assert laid[0, 32, 32].tolist() == [0xD0, 0x40, 0x40]


def test_what_was_drawn_is_read_back(tmp_path: Path) -> None:
    first = some_icons(tmp_path)
    [file] = tmp_path.glob("icons-*.npy")
    before = file.stat().st_mtime_ns
    assert (some_icons(tmp_path).drawn == first.drawn).all()
    assert file.stat().st_mtime_ns == before


def test_a_background_is_known_by_its_colour() -> None:
    for name, colour in BACKGROUNDS.items():
        assert nearest_background(np.array(colour, float) + 5) == name


def test_captions_name_what_is_seen(icons: Icons) -> None:
    choose = random.Random(0)  # noqa: S311 - captions, no secret
    captions = [caption(icons.icons[0], "teal", choose) for _ in range(500)]
    assert all("teal" in text for text in captions)
    assert sum("circle" in text for text in captions) > 400
    assert sum(any(word in text for word in ("glossy", "3d")) for text in captions) > 350
    assert len(set(captions)) > 50
    assert plain_caption("red apple", "flat", "blue") == "red apple, flat, on a blue background"


def test_about_the_share_that_is_asked_for_is_held_out_and_always_the_same() -> None:
    pairs = [(f"name {number}", background) for number in range(500) for background in NAMES]
    held_out = [is_held_out(name, background, 0.1) for name, background in pairs]
    assert np.mean(held_out) == pytest.approx(0.1, abs=0.015)
    assert held_out == [is_held_out(name, background, 0.1) for name, background in pairs]
    assert not any(is_held_out(name, background, 0.0) for name, background in pairs)


def test_held_out_combinations_are_never_trained_on(icons: Icons) -> None:
    # Each latent tells which combination it is.
    encoded = np.arange(8 * 12, dtype=np.float16).reshape(8, 12, 1, 1, 1)
    latents = Latents(icons.icons, encoded, 0.3)
    seen = {int(value) for step in range(200) for value in latents.batch((0, step), 16, 0.1)[0].ravel()}
    for index, icon in enumerate(icons.icons):
        for number, background in enumerate(NAMES):
            assert (index * 12 + number in seen) == (not is_held_out(icon.name, background, 0.3))


def test_a_step_has_the_same_data_whenever_it_is_made(icons: Icons) -> None:
    one, other = (image_batch(icons, seed=(0, 7, 0), batch_size=4, crop_px=32) for _ in range(2))
    assert (one == other).all()
    assert one.shape == (4, 3, 32, 32)
    assert -1 <= one.min() < one.max() <= 1
    assert (image_batch(icons, seed=(0, 8, 0), batch_size=4, crop_px=32) != one).any()


def test_the_tokenizer_knows_every_word_of_the_captions(icons: Icons) -> None:
    captions = sample_captions(icons.icons, 0)
    tokenizer = tokenizer_from_captions(captions, vocabulary=600, tokens=16)
    ids = tokenizer("a triangle, flat, on a blue background").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert len(ids) == 11  # seven words, two commas, the start and the end
    assert tokenizer.model_max_length == 16


def test_retrieval_finds_each_icon_and_its_style(icons: Icons) -> None:
    gallery = Gallery(icons.icons, icons.drawn)
    for index, icon in enumerate(icons.icons):
        [image] = lay_on(icons.drawn[index][None], COLOURS[3][None])
        noisy = np.clip(image + np.random.default_rng(0).normal(0, 12, image.shape), 0, 255).astype(np.uint8)
        found = gallery.find(noisy, icon.name, icon.style, NAMES[3])
        assert (found.rank, found.style, found.background) == (0, icon.style, NAMES[3])
    [other] = lay_on(icons.drawn[0][None], COLOURS[3][None])
    assert gallery.find(other, "square", "glossy", NAMES[3]).rank > 0


def test_the_shipped_configuration_is_read() -> None:
    training = read_config(CONFIGS / "tiny-emoji.yaml", Training)
    assert training.ldm.unet["in_channels"] == training.vae.model["latent_channels"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: {styles: [oil]}", "no style 'oil'"),
        ("data: {size: 3}", "unknown field `size`"),
        ("data: [", "configuration"),
    ],
)
def test_what_a_configuration_says_wrong_is_said(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_config(file, Training)


def test_names_are_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes("\ufeff# some\nclown\npi\u00f1ata\n".encode())
    code = (
        "from pathlib import Path; from diffuserve_training.config import Data, read_names;"
        "print(ascii(sorted(read_names(Path('c.yaml'), Data(names='names.txt')))))"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == r"['clown', 'pi\xf1ata']"
    (tmp_path / "names.txt").write_bytes(b"clown\npi\xf1ata\n")
    with pytest.raises(ConfigError, match=r"names\.txt is not text in UTF-8 .* at byte 8"):
        read_names(tmp_path / "c.yaml", Data(names="names.txt"))


def test_a_path_is_looked_for_beside_the_configuration_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs" / "both").mkdir(parents=True)
    for name in ("both", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    config = Path("configs", "c.yaml")
    assert located(config, "both") == Path("configs", "both")
    assert located(config, "here") == Path("here")
    assert located(config, "../here") == Path("configs", "..", "here")
    assert located(config, "none") == Path("configs", "none")
    assert located(config, str(tmp_path / "here")) == tmp_path / "here"


def test_a_checkpoint_is_a_folder_or_an_id(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    for folder in ("good/one.bin", "bad"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "good" / "one.bin" / "model_index.json").write_text("{}")
    (tmp_path / "good" / "sd.safetensors").write_bytes(b"")
    assert located_checkpoint(config, "good/one.bin") == str(tmp_path / "good" / "one.bin")
    assert located_checkpoint(config, "someone/stable-diffusion.v1") == "someone/stable-diffusion.v1"
    for name, reason in (
        ("good/sd.safetensors", "single files cannot be trained on"),
        ("none/sd.ckpt", "single files cannot be trained on"),
        ("bad", "bad has no model_index.json. It must be a folder in diffusers' format, or an id"),
        ("nowhere", "there is no folder nowhere in .* or the working directory. It must be a folder"),
        ("../nowhere", "there is no folder"),
        ("models/a/b", "there is no folder"),
    ):
        with pytest.raises(ConfigError, match=reason):
            located_checkpoint(config, name)


def test_an_archive_with_another_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / FLUENT_FLAT.file).write_bytes(b"something else")
    with pytest.raises(TrainingDataError, match="its hash differs"):
        read_json(FLUENT_FLAT, "icons.json", tmp_path)


def test_the_command_line_knows_every_style() -> None:
    assert list(train_command._STYLES.choices) == list(STYLES)
