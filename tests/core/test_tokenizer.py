from __future__ import annotations

import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTokenizer

from diffuserve.errors import BundleError
from diffuserve.tokenizer import Tokenizer

FOLDER = Path(__file__).parents[2] / "model_store" / "checkpoints" / "tiny-emoji" / "tokenizer"
LENGTHS = (8, 77)

TEXTS = [
    "",
    " ",
    "\n\t  \n",
    "a red apple",
    "A Red APPLE",
    "  spaces   inside\tand around \n",
    "it's the dog's; they're 12345 (don't!)",
    "naïve café, Ångström, Straße, İstanbul",
    "e\u0301 decomposed and \u00e9 composed",
    "日本語のテキスト 漢字 한국어 العربية हिन्दी",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽",
    "😀" * 60,
    "<|endoftext|>",
    "a <|startoftext|> inside <|endoftext|> here",
    "<|EndOfText|> in other letters",
    "x" * 500,
    "very, very long: " + "a photo of a grinning cat with tears of joy, " * 30,
    "\u0000 null, \u200b zero width, \ufeff mark, \U0010ffff last",
    "a cat! a dog!! wow ! end!",
    "#@!$%^&*()_+-=[]{}|;':\",./<>?`~\\",
]
_random = random.Random(0)  # noqa: S311
TEXTS += [
    "".join(chr(_random.choice((_random.randrange(32, 127), _random.randrange(0xA0, 0xD7FF)))) for _ in range(n))
    for n in (1, 2, 5, 20, 80, 200)
    for _ in range(5)
]


@pytest.fixture(scope="module", params=["as bundled", "padded with !"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled tokenizer, and one that pads as Stable Diffusion 2's does."""
    if request.param == "as bundled":
        return FOLDER
    reference = CLIPTokenizer.from_pretrained(FOLDER)
    reference.pad_token = "!"  # noqa: S105
    path: Path = tmp_path_factory.mktemp("tokenizer")
    reference.save_pretrained(path)
    return path


@pytest.mark.parametrize("max_tokens", LENGTHS)
def test_equals_transformers(folder: Path, max_tokens: int) -> None:
    reference = CLIPTokenizer.from_pretrained(folder)
    ours = Tokenizer(folder, max_tokens)
    for text in TEXTS:
        expected = reference(text, padding="max_length", truncation=True, max_length=max_tokens)["input_ids"]
        encoded = ours.encode(text)
        assert encoded.input_ids.dtype == np.int32
        assert encoded.input_ids.tolist() == expected, text


def test_dropped_text_is_the_end_that_did_not_fit() -> None:
    tokenizer = Tokenizer(FOLDER, 77)
    words = [f"{word}" for word in ("red", "blue", "cat", "dog")] * 30
    text = "  ".join(words).upper()
    dropped = tokenizer.encode(text).dropped_text
    assert dropped
    assert text.endswith(dropped)
    kept = text.removesuffix(dropped)
    assert tokenizer.encode(kept).dropped_text == ""
    assert tokenizer.encode(kept).input_ids.tolist() == tokenizer.encode(text).input_ids.tolist()


def test_nothing_is_dropped_up_to_the_last_place() -> None:
    full = Tokenizer(FOLDER, 400).encode("dog " * 100)
    count = int(np.argmax(full.input_ids == full.input_ids[-1])) + 1  # the first end token; padding is the same token
    assert Tokenizer(FOLDER, count).encode("dog " * 100).dropped_text == ""
    assert Tokenizer(FOLDER, count - 1).encode("dog " * 100).dropped_text.strip() == "dog"


def test_dropped_text_starts_with_a_whole_character() -> None:
    # An emoji is several tokens; where the cut goes through one, it counts as dropped.
    tokenizer = Tokenizer(FOLDER, 10)
    for lead in range(12):
        dropped = tokenizer.encode("a " * lead + "🦄" * 12).dropped_text
        assert dropped
        assert set(dropped) <= {"a", " ", "🦄"}


def test_encodes_the_same_from_many_threads() -> None:
    tokenizer = Tokenizer(FOLDER, 77)
    expected = [tokenizer.encode(text).input_ids.tolist() for text in TEXTS]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert [encoded.input_ids.tolist() for encoded in pool.map(tokenizer.encode, TEXTS)] == expected


def _copy(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FOLDER / name, tmp_path / name)
    return tmp_path


def test_truncation_and_padding_of_the_file_are_not_used(tmp_path: Path) -> None:
    path = _copy(tmp_path) / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 20},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    path.write_text(json.dumps(content))
    text = "a red apple on a blue table, and a dog"
    assert (
        Tokenizer(tmp_path, 77).encode(text).input_ids.tolist() == Tokenizer(FOLDER, 77).encode(text).input_ids.tolist()
    )


def test_special_tokens_may_carry_settings(tmp_path: Path) -> None:
    path = _copy(tmp_path) / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["pad_token"] = {"content": "!", "lstrip": False, "normalized": False}
    path.write_text(json.dumps(config))
    vocabulary = json.loads((FOLDER / "vocab.json").read_text())
    assert Tokenizer(tmp_path, 77).encode("").input_ids[-1] == vocabulary["!"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_missing_and_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    path = _copy(tmp_path) / name
    path.write_text("{")
    with pytest.raises(BundleError, match=f"{name} is damaged"):
        Tokenizer(tmp_path, 77)
    path.unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        Tokenizer(tmp_path, 77)


@pytest.mark.parametrize("token", [None, "no such token", 3])
def test_unknown_special_token_is_named(tmp_path: Path, token: object) -> None:
    path = _copy(tmp_path) / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["pad_token"] = token
    path.write_text(json.dumps(config))
    with pytest.raises(BundleError, match="pad_token"):
        Tokenizer(tmp_path, 77)
