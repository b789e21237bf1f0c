r"""The attention syntax of prompts: which words count for more, and which for less.

    (word)       1.1 times the attention        (word:1.3)           1.3 times
    [word]       1 / 1.1 times                  \( \) \[ \] \\       the characters themselves
    BREAK        what follows begins a chunk of tokens of its own

Brackets nest, and their factors multiply. It is the syntax of AUTOMATIC1111's web UI (`parse_prompt_attention`), which
most prompts in circulation are written in; docs/prompting.md says where this differs, and
`diffuserve.text.prompt_syntax` knows what else the web UI reads.
"""

from __future__ import annotations

import re
from itertools import groupby
from operator import itemgetter

WeightedText = tuple[str, float]

# Among the texts of a prompt: the end of a chunk. As in the web UI no text of its own looks like it.
BREAK: WeightedText = ("BREAK", -1.0)

# Attention beyond this, in either direction, counts as this much. Usual weights lie between 0.5 and 1.5.
MAX_WEIGHT = 10.0

_FACTORS = {"(": 1.1, "[": 1 / 1.1}
_SYMBOL = re.compile(
    r"""
      \\ (?P<escaped> [\\()\[\]]? )
    | (?P<opening> [(\[] )
    | (?P<closing> [)\]] )
    | : \s* (?P<number> [+-]? (?: [0-9]+ (?: \. [0-9]* )? | \. [0-9]+ ) ) \s* \)
    """,
    re.VERBOSE,
)
_BREAK = re.compile(r"\bBREAK\b")


def parse_prompt(prompt: str) -> list[WeightedText]:
    r"""Splits any prompt into texts and their weights, in order; never fails.

    A bracket that is never closed holds to the end of the prompt, with its usual factor. A closing bracket that has
    nothing to close is text. A backslash before any other character is dropped. Round and square brackets are matched
    apart from each other.

    `BREAK` as a word of its own is the end of a chunk, and the blanks around it are dropped. Brackets multiply it as
    they do texts, so within them it is a word, of minus their weight.

    Returns:
        At least one pair. Texts of one weight that follow each other are one text; a text is empty only if it is the only
        one. Weights are within -`MAX_WEIGHT` .. `MAX_WEIGHT`, and exactly 1.0 outside all brackets.
    """
    symbols = list(_SYMBOL.finditer(prompt))
    opening, closing = _matched(symbols)
    # For each kind of bracket, the product of those open, after each of them.
    products = {bracket: [1.0] for bracket in _FACTORS}
    parts: list[WeightedText] = []

    def add(text: str, factor: float = 1.0) -> None:
        parts.append((text, factor * _bounded(products["("][-1] * products["["][-1])))

    def add_between(text: str) -> None:
        if not text:
            return
        # The blanks are taken off afterwards: as part of the pattern, a long run of them would take quadratic time.
        first, *others = _BREAK.split(text)
        add(first.rstrip() if others else first)
        for number, other in enumerate(others, 1):
            add(*BREAK)
            add(other.lstrip() if number == len(others) else other.strip())

    end = 0
    for index, symbol in enumerate(symbols):
        add_between(prompt[end : symbol.start()])
        end = symbol.end()
        if index in opening:
            product = products[symbol["opening"]]
            product.append(_bounded(product[-1] * opening[index]))
        elif index in closing:
            products[closing[index]].pop()
        else:
            add(symbol[0] if symbol["escaped"] is None else symbol["escaped"])
    add_between(prompt[end:])
    joined = [("".join(text for text, _ in group), weight) for weight, group in groupby(parts, key=itemgetter(1))]
    return [part for part in joined if part[0]] or [("", 1.0)]


def _matched(symbols: list[re.Match[str]]) -> tuple[dict[int, float], dict[int, str]]:
    """By index of the symbol: the factor of each opening bracket, and the bracket that each closing one closes."""
    opening: dict[int, float] = {}
    closing: dict[int, str] = {}
    still_open: dict[str, list[int]] = {bracket: [] for bracket in _FACTORS}
    for index, symbol in enumerate(symbols):
        if bracket := symbol["opening"]:
            still_open[bracket].append(index)
            opening[index] = _FACTORS[bracket]
        elif symbol["escaped"] is None:
            bracket = "[" if symbol["closing"] == "]" else "("
            if still_open[bracket]:
                opened = still_open[bracket].pop()
                closing[index] = bracket
                if symbol["number"]:
                    opening[opened] = _bounded(float(symbol["number"]))
    return opening, closing


def _bounded(weight: float) -> float:
    return max(-MAX_WEIGHT, min(MAX_WEIGHT, weight))
