"""A tokenizer in CLIP's format, made from captions."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from diffuserve_training.backgrounds import NAMES
from diffuserve_training.captions import caption, vocabulary
from diffuserve_training.description import TURNS, Describer, HeldOut
from diffuserve_training.icons import Icon

_CAPTIONS_AN_ICON = 8


def tokenizer_from_captions(captions: Sequence[str], *, vocabulary: int, tokens: int) -> Any:
    """A `transformers.CLIPTokenizer`: byte-level pairs, with CLIP's own special tokens.

    Args:
        captions: what its pairs are counted in.
        vocabulary: entries at most; less if the captions do not hold so many pairs.
        tokens: `model_max_length`.
    """
    from transformers import CLIPTokenizer

    trained = CLIPTokenizer().train_new_from_iterator(captions, vocab_size=vocabulary, show_progress=False)
    # The trainer numbers single letters in an order that differs from run to run, and weights depend on the numbers.
    merges: Any = [tuple(pair) for pair in json.loads(trained.backend_tokenizer.to_str())["model"]["merges"]]
    special = [trained.bos_token, trained.eos_token]
    merged = list(dict.fromkeys("".join(pair) for pair in merges))
    letters = sorted(set(trained.get_vocab()) - set(special) - set(merged))
    numbers = {token: number for number, token in enumerate([*special, *letters, *merged])}
    return CLIPTokenizer(vocab=numbers, merges=merges, model_max_length=tokens)


def sample_captions(icons: Sequence[Icon], held_out: float, seed: int) -> list[str]:
    """Some captions for every icon, with every word that a caption can have."""
    choose = random.Random(seed)  # noqa: S311 - training data, no secret
    describe = Describer(icons, HeldOut(held_out))
    count = _CAPTIONS_AN_ICON * len(icons) // 2
    captions = [caption(describe(choose, things), icons, choose) for things in (1, 2) for _ in range(count)]
    captions += [" ".join((icon.name, *icon.others, *icon.tags)) for icon in icons]
    captions += vocabulary(sorted({icon.style for icon in icons})) * len(NAMES)
    captions += [f"on a {name} background" for name in NAMES] * len(TURNS)
    captions += [f"a {turn} mirrored" for turn in TURNS] * len(NAMES)
    return captions
