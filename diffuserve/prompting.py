r"""The attention syntax of prompts: which words count for more, and which for less.

    (word)       1.1 times the attention        (word:1.3)           1.3 times
    [word]       1 / 1.1 times                  \( \) \[ \] \\       the characters themselves

Brackets nest, and their factors multiply. It is the syntax of AUTOMATIC1111's web UI (`parse_prompt_attention`), which
most prompts in circulation are written in; docs/prompting.md says where this differs.
"""

from __future__ import annotations

import re
from itertools import groupby
from operator import itemgetter

WeightedText = tuple[str, float]

# Attention beyond this, in either direction, counts as this much. Usual weights lie between 0.5 and 1.5.
MAX_WEIGHT = 10.0

_FACTORS = {"(": 1.1, "[": 1 / 1.1}
_SYMBOL = re.compile(
    r"""
      \\ (?P<escaped> [\\()\[\]] )
    | (?P<opening> [(\[] )
    | (?P<closing> [)\]] )
    | : \s* (?P<number> [+-]? (?: [0-9]+ (?: \. [0-9]* )? | \. [0-9]+ ) ) \s* \)
    """,
    re.VERBOSE,
)


def parse_prompt(prompt: str) -> list[WeightedText]:
    r"""Splits any prompt into texts and their weights, in order; never fails.

    A bracket that is never closed holds to the end of the prompt, with its usual factor. A closing bracket that has
    nothing to close is text, and so is a backslash before any other character. Round and square brackets are matched
    apart from each other.

    Returns:
        At least one pair. Neighbours differ in weight; a text is empty only if it is the only one. Weights are within
        -`MAX_WEIGHT` .. `MAX_WEIGHT`, and exactly 1.0 outside all brackets.
    """
    symbols = list(_SYMBOL.finditer(prompt))
    opening, closing = _matched(symbols)
    # For each kind of bracket, the product of those open, after each of them.
    products = {bracket: [1.0] for bracket in _FACTORS}
    parts: list[WeightedText] = []

    def add(text: str) -> None:
        if text:
            parts.append((text, _bounded(products["("][-1] * products["["][-1])))

    end = 0
    for index, symbol in enumerate(symbols):
        add(prompt[end : symbol.start()])
        end = symbol.end()
        if index in opening:
            product = products[symbol["opening"]]
            product.append(_bounded(product[-1] * opening[index]))
        elif index in closing:
            products[closing[index]].pop()
        else:
            add(symbol["escaped"] or symbol[0])
    add(prompt[end:])
    alike = groupby(parts, key=itemgetter(1))
    return [("".join(text for text, _ in group), weight) for weight, group in alike] or [("", 1.0)]


def _matched(symbols: list[re.Match[str]]) -> tuple[dict[int, float], dict[int, str]]:
    """By index of the symbol: the factor of each opening bracket, and the bracket that each closing one closes."""
    opening: dict[int, float] = {}
    closing: dict[int, str] = {}
    still_open: dict[str, list[int]] = {bracket: [] for bracket in _FACTORS}
    for index, symbol in enumerate(symbols):
        if bracket := symbol["opening"]:
            still_open[bracket].append(index)
            opening[index] = _FACTORS[bracket]
        elif not symbol["escaped"]:
            bracket = "[" if symbol["closing"] == "]" else "("
            if still_open[bracket]:
                opened = still_open[bracket].pop()
                closing[index] = bracket
                if symbol["number"]:
                    opening[opened] = _bounded(float(symbol["number"]))
    return opening, closing


def _bounded(weight: float) -> float:
    return max(-MAX_WEIGHT, min(MAX_WEIGHT, weight))
