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
from diffuserve.text.prompting import BREAK, parse_prompt
from diffuserve.text.tokenizer import Tokenizer
from tests.core.webui import chunks_of, read_prompt

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
        encoded = ours.encode([(text, 1.0)])
        assert encoded.input_ids.dtype == np.int32
        assert encoded.input_ids.tolist() == [expected], text
        assert (encoded.weights.dtype, encoded.weights.shape) == (np.float32, (1, max_tokens))
        assert (encoded.weights == 1).all()


def test_dropped_text_is_the_end_that_did_not_fit() -> None:
    tokenizer = Tokenizer(FOLDER, 77)
    words = [f"{word}" for word in ("red", "blue", "cat", "dog")] * 60
    text = "  ".join(words).upper()
    for chunks in (1, 2):
        encoded = tokenizer.encode([(text, 1.0)], chunks)
        dropped = encoded.dropped_text
        assert dropped
        assert text.endswith(dropped)
        kept = tokenizer.encode([(text.removesuffix(dropped), 1.0)], chunks)
        assert kept.dropped_text == ""
        assert kept.input_ids.tolist() == encoded.input_ids.tolist()


def test_nothing_is_dropped_up_to_the_last_place() -> None:
    dogs = [("dog " * 100, 1.0)]
    [full] = Tokenizer(FOLDER, 400).encode(dogs).input_ids
    count = int(np.argmax(full == full[-1])) + 1  # the first end token; padding is the same token
    assert Tokenizer(FOLDER, count).encode(dogs).dropped_text == ""
    assert Tokenizer(FOLDER, count - 1).encode(dogs).dropped_text.strip() == "dog"


def test_chunks_are_filled_one_after_the_other() -> None:
    reference = CLIPTokenizer.from_pretrained(FOLDER)
    texts = [("a red apple, ", 1.0), ("glossy", 1.3), (" and a dog, " * 6, 0.5), ("", 2.0), ("flat", -1.0)]
    ids, weights = [], []
    for text, weight in texts:
        of_text = reference(text, add_special_tokens=False).input_ids
        ids += of_text
        weights += [weight] * len(of_text)
    assert 20 < len(ids) < 60
    encoded = Tokenizer(FOLDER, 12).encode(texts, max_chunks=6)
    assert encoded.dropped_text == ""
    assert encoded.input_ids.shape == encoded.weights.shape == (-(-len(ids) // 10), 12)
    assert encoded.input_ids[:, 1:-1].ravel()[: len(ids)].tolist() == ids
    np.testing.assert_array_equal(encoded.weights[:, 1:-1].ravel()[: len(ids)], np.array(weights, np.float32))
    assert (encoded.input_ids[:, 0] == reference.bos_token_id).all()
    assert (encoded.input_ids[:, -1] == reference.eos_token_id).all()
    assert (encoded.input_ids[:, 1:-1].ravel()[len(ids) :] == reference.eos_token_id).all()  # the end, and padding
    assert (encoded.weights[:, [0, -1]] == 1).all()
    assert (encoded.weights[:, 1:-1].ravel()[len(ids) :] == 1).all()
    # Exactly full: no empty chunk follows.
    assert len(Tokenizer(FOLDER, len(ids) + 2).encode(texts, max_chunks=6).input_ids) == 1


def test_empty_chunks_follow_where_more_are_asked_for() -> None:
    tokenizer = Tokenizer(FOLDER, 12)
    encoded = tokenizer.encode([("a dog", 1.5)], max_chunks=3, min_chunks=3)
    alone, empty = (tokenizer.encode([(text, 1.5)]) for text in ("a dog", ""))
    np.testing.assert_array_equal(
        encoded.input_ids, np.concatenate([alone.input_ids, empty.input_ids, empty.input_ids])
    )
    np.testing.assert_array_equal(encoded.weights[1:], np.ones((2, 12)))


def test_what_is_dropped_may_be_several_texts() -> None:
    tokenizer = Tokenizer(FOLDER, 5)
    texts = [("a red", 1.0), (" dog and a blue", 1.2), (" cat", 1.0)]
    dropped = tokenizer.encode(texts).dropped_text
    assert dropped.endswith(" a blue cat")
    assert "a red dog and a blue cat".endswith(dropped)
    assert tokenizer.encode(texts, max_chunks=9).dropped_text == ""


@pytest.mark.parametrize(
    ("prompt", "chunks"),
    [
        ("a dog BREAK cat", ["a dog", "cat"]),
        ("BREAK a dog", ["", "a dog"]),
        ("a dog BREAK", ["a dog"]),
        ("a dog BREAK BREAK", ["a dog", ""]),
        ("a dog BREAK BREAK BREAK cat", ["a dog", "", "", "cat"]),
        ("BREAK", [""]),
        ("BREAK BREAK", ["", ""]),
        # A chunk that is full to its last place is not followed by an empty one.
        ("dog " * 10 + "BREAK cat", ["dog " * 10, "cat"]),
        ("dog " * 11 + "BREAK cat", ["dog " * 10, "dog", "cat"]),
        ("dog " * 20 + "BREAK", ["dog " * 10, "dog " * 10]),
    ],
)
def test_a_break_ends_a_chunk(prompt: str, chunks: list[str]) -> None:
    tokenizer = Tokenizer(FOLDER, 12)
    encoded = tokenizer.encode(parse_prompt(prompt), max_chunks=9)
    expected = [tokenizer.encode([(chunk, 1.0)]).input_ids for chunk in chunks]
    np.testing.assert_array_equal(encoded.input_ids, np.concatenate(expected))
    assert encoded.dropped_text == ""
    assert (encoded.weights == 1).all()


@pytest.mark.parametrize(
    ("prompt", "max_chunks", "kept", "dropped"),
    [
        ("a dog BREAK cat", 1, "a dog", "cat"),
        ("a dog BREAK (red:1.3) cat BREAK blue", 1, "a dog", "red cat BREAK blue"),
        ("a dog BREAK cat BREAK blue", 2, "a dog BREAK cat", "blue"),
        ("a dog BREAK", 1, "a dog", ""),
        ("a dog BREAK (  )", 1, "a dog", ""),
        ("BREAK BREAK BREAK", 2, "BREAK BREAK", " BREAK "),
        ("dog " * 12 + "BREAK cat", 1, "dog " * 10, "dog dog BREAK cat"),
        ("dog " * 10 + "BREAK cat", 1, "dog " * 10, "cat"),
    ],
)
def test_what_is_dropped_may_have_breaks(prompt: str, max_chunks: int, kept: str, dropped: str) -> None:
    tokenizer = Tokenizer(FOLDER, 12)
    encoded = tokenizer.encode(parse_prompt(prompt), max_chunks)
    assert encoded.dropped_text == dropped
    np.testing.assert_array_equal(encoded.input_ids, tokenizer.encode(parse_prompt(kept), max_chunks).input_ids)


def test_random_prompts_have_the_chunks_of_the_web_ui() -> None:
    rng = random.Random(4)  # noqa: S311
    pieces = [
        "red ",
        "dog, ",
        "glossy cat",
        "BREAK",
        " BREAK ",
        "BREAKS",
        "(",
        ":1.3)",
        "[",
        "]",
        ")",
        "\\",
        "\\(",
        "\n",
        "x:",
    ]
    reference = CLIPTokenizer.from_pretrained(FOLDER)
    tokenizer = Tokenizer(FOLDER, 8)
    breaks = 0
    for _ in range(1000):
        prompt = "".join(rng.choice(pieces) for _ in range(rng.randint(0, 14)))
        texts = read_prompt(prompt)
        if any(abs(abs(weight) - 1) < 1e-9 and abs(weight) != 1 for _, weight in texts):
            continue  # of which web UI's order of rounding decides
        chunks = chunks_of(texts, lambda text: reference(text, add_special_tokens=False).input_ids, 6)
        encoded = tokenizer.encode(parse_prompt(prompt), max_chunks=99)
        assert len(encoded.input_ids) == len(chunks), prompt
        for ids, weights, chunk in zip(encoded.input_ids, encoded.weights, chunks, strict=True):
            end = 1 + len(chunk)
            assert ids[1:end].tolist() == [token for token, _ in chunk], prompt
            assert (ids[end:] == reference.eos_token_id).all()
            np.testing.assert_allclose(weights[1:end], [weight for _, weight in chunk], rtol=1e-6)
            assert (weights[end:] == 1).all()
        breaks += BREAK in parse_prompt(prompt)
    assert breaks > 200


def test_dropped_text_starts_with_a_whole_character() -> None:
    # An emoji is several tokens; where the cut goes through one, it counts as dropped.
    tokenizer = Tokenizer(FOLDER, 10)
    for lead in range(12):
        dropped = tokenizer.encode([("a " * lead + "🦄" * 12, 1.0)]).dropped_text
        assert dropped
        assert set(dropped) <= {"a", " ", "🦄"}


def test_encodes_the_same_from_many_threads() -> None:
    tokenizer = Tokenizer(FOLDER, 77)
    prompts = [[(text, 1.0)] for text in TEXTS]
    expected = [tokenizer.encode(prompt).input_ids.tolist() for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert [encoded.input_ids.tolist() for encoded in pool.map(tokenizer.encode, prompts)] == expected


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
    prompt = [("a red apple on a blue table, and a dog", 1.0)]
    changed, unchanged = (Tokenizer(folder, 77).encode(prompt).input_ids for folder in (tmp_path, FOLDER))
    np.testing.assert_array_equal(changed, unchanged)


def test_special_tokens_may_carry_settings(tmp_path: Path) -> None:
    path = _copy(tmp_path) / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["pad_token"] = {"content": "!", "lstrip": False, "normalized": False}
    path.write_text(json.dumps(config))
    vocabulary = json.loads((FOLDER / "vocab.json").read_text())
    assert Tokenizer(tmp_path, 77).encode([("", 1.0)]).input_ids[0, -1] == vocabulary["!"]


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
