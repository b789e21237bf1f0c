"""Training data: icons, captions, backgrounds, tokenizer, retrieval."""

from __future__ import annotations

import itertools
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from diffuserve_training import train_command
from diffuserve_training.backgrounds import NAMES
from diffuserve_training.captions import caption, plain_caption
from diffuserve_training.config import ConfigError, Data, Training, located, located_checkpoint, read_config, read_names
from diffuserve_training.dataset import Icons, Pictures, Steps
from diffuserve_training.description import Background, Describer, Description, HeldOut, Thing
from diffuserve_training.icons import STYLES
from diffuserve_training.packages import FLUENT_FLAT, TrainingDataError, read_json
from diffuserve_training.tokenizer import sample_captions, tokenizer_from_captions
from tests.training.drawings import SHAPES, small_training, some_icons

CONFIGS = Path(__file__).parents[2] / "training" / "configs"


@pytest.fixture(scope="module")
def icons(tmp_path_factory: pytest.TempPathFactory) -> Icons:
    return some_icons(tmp_path_factory.mktemp("icons"))


def test_icons_are_drawn_with_alpha_and_fill_their_canvas(icons: Icons) -> None:
    assert icons.drawn.shape == (8, 160, 160, 4)
    assert (icons.drawn[:, 80, 80] == [[0xD0, 0x40, 0x40, 255]] * 4 + [[0x40, 0x60, 0xD0, 255]] * 4).all()
    for drawn, extent in zip(icons.drawn, icons.extents, strict=True):
        rows, columns = np.flatnonzero(drawn[..., 3].max(axis=1)), np.flatnonzero(drawn[..., 3].max(axis=0))
        assert rows[0] >= 4
        assert columns[0] == pytest.approx(4, abs=1)  # all are at least as wide as high
        assert columns[-1] == pytest.approx(155, abs=1)
        assert extent[0] == 1
    assert icons.extents[2, 1] == pytest.approx(24 / 26, abs=0.02)  # the triangle


def test_what_was_drawn_is_read_back(tmp_path: Path) -> None:
    first = some_icons(tmp_path)
    [file] = tmp_path.glob("icons-*.npz")
    before = file.stat().st_mtime_ns
    assert (some_icons(tmp_path).drawn == first.drawn).all()
    assert file.stat().st_mtime_ns == before


def test_captions_say_what_is_described_and_nothing_else(icons: Icons) -> None:
    choose = random.Random(0)  # noqa: S311 - captions, no secret
    background = Background("two", ("teal", "pink"))
    description = Description((Thing(0, size="small", turn="tilted left"),), None, "top left", background)
    captions = [caption(description, icons.icons, choose) for _ in range(300)]
    for text in captions:
        assert re.search(r"teal .*pink", text)
        assert re.search(r"\b(small|little)\b", text)
        assert "tilted left" in text
        assert "top left" in text
        assert re.search(r"\b(glossy|3d)\b", text)
        assert not re.search("shadow|mirrored|gradient", text)
    assert sum("circle thing" in text for text in captions) > 80
    assert sum("shape" in text for text in captions) > 10
    assert len(set(captions)) > 100
    pair = Description((Thing(0), Thing(1)), "left of", style=False)
    assert all(re.search(r"circle.* left of .*square", caption(pair, icons.icons, choose)) for _ in range(50))


def test_plain_captions_are_those_of_the_docs(icons: Icons) -> None:
    red = Background("plain", ("red",))
    assert (
        plain_caption(Description((Thing(0),), background=red), icons.icons) == "a circle, glossy, on a red background"
    )
    small = Description((Thing(4, "small", None, True),), None, "top right", red, shadow=True)
    assert (
        plain_caption(small, icons.icons)
        == "a small mirrored circle, flat, top right, on a red background, with a shadow"
    )
    pair = Description((Thing(0), Thing(1)), "left of", None, Background("gradient", ("red", "blue")))
    assert plain_caption(pair, icons.icons) == "a circle left of a square, glossy, on a red to blue gradient"
    assert plain_caption(Description((Thing(0), Thing(1))), icons.icons) == "a circle and a square, glossy"


def test_about_the_share_that_is_asked_for_is_held_out_and_always_the_same() -> None:
    names = [f"name {number}" for number in range(300)]
    held_out = HeldOut(0.1)
    assert np.mean([held_out(name, colour) for name in names for colour in NAMES]) == pytest.approx(0.1, abs=0.02)
    pairs = [(name, other) for name in names[:100] for other in names[100:130]]
    assert np.mean([held_out(*pair) for pair in pairs]) == pytest.approx(0.1, abs=0.02)
    again = HeldOut(0.1)
    assert all(held_out(name, other) == again(other, name) for name, other in pairs)
    assert not any(HeldOut(0.0)(name, colour) for name in names for colour in NAMES)


def test_held_out_combinations_are_never_trained_on(icons: Icons) -> None:
    held_out = HeldOut(0.3)
    describe = Describer(icons.icons, held_out)
    choose = random.Random(0)  # noqa: S311 - training data, no secret
    seen: set[tuple[str, str]] = set()
    for number in range(3000):
        description = describe(choose, 1 + number % 2)
        icons_said = [thing.icon for thing in description.things]
        names = [icons.icons[icon].name for icon in icons_said]
        assert len({icons.icons[icon].style for icon in icons_said}) == 1
        background = description.background or describe.background(icons_said, choose)
        seen |= {(name, colour) for name in names for colour in background.colours}
        if len(names) == 2:
            seen.add((min(names), max(names)))
    everything = [(name, colour) for name in SHAPES for colour in NAMES] + list(
        itertools.combinations(sorted(SHAPES), 2)
    )
    assert seen == {pair for pair in everything if not held_out(*pair)}


def test_a_step_has_the_same_data_whenever_it_is_made(icons: Icons) -> None:
    pictures = Pictures(icons, small_training().data)
    (one, said, choose), (other, again, also) = (pictures.batch((0, 7, 0), 6) for _ in range(2))
    assert said == again
    assert choose.random() == also.random()
    assert all(torch.equal(mine, its) for mine, its in zip(one.tensors(), other.tensors(), strict=True))
    assert pictures.batch((0, 8, 0), 6)[1] != said


def test_steps_are_shared_out_among_workers_and_come_in_order() -> None:
    steps = Steps(lambda step: step, lambda: 5)
    for workers in (0, 2):
        loader = DataLoader(
            steps, batch_size=None, num_workers=workers, multiprocessing_context="fork" if workers else None
        )
        assert list(itertools.islice(loader, 8)) == list(range(5, 13))


def test_the_tokenizer_knows_every_word_of_the_captions(icons: Icons) -> None:
    captions = sample_captions(icons.icons, 0.3, 0)
    tokenizer = tokenizer_from_captions(captions, vocabulary=600, tokens=16)
    ids = tokenizer("a triangle, flat, on a blue background").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert len(ids) == 11  # seven words, two commas, the start and the end
    assert tokenizer.model_max_length == 16


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
    (tmp_path / "names.txt").write_bytes("\ufeff# some\nclown = fool\npi\u00f1ata\n".encode())
    code = (
        "from pathlib import Path; from diffuserve_training.config import Data, read_names;"
        "print(ascii(read_names(Path('c.yaml'), Data(names='names.txt'))))"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == r"{'clown': ('fool',), 'pi\xf1ata': ()}"
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
