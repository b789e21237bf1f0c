from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from diffuserve.text.prompting import BREAK, MAX_WEIGHT, parse_prompt
from tests.core.webui import read_prompt

SPECIAL = r"\()[]"
# Texts of which the syntax's own characters are a good part.
TEXTS = st.text(alphabet=st.sampled_from(SPECIAL + ":.-+0 1a") | st.characters())


def escaped(text: str) -> str:
    return re.sub(r"[\\()\[\]]", r"\\\g<0>", text)


def letters(texts: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Each character with its weight."""
    return [(letter, weight) for text, weight in texts for letter in text]


def assert_close(actual: list[tuple[str, float]], expected: list[tuple[str, float]]) -> None:
    assert [text for text, _ in actual] == [text for text, _ in expected]
    assert [weight for _, weight in actual] == pytest.approx([weight for _, weight in expected], rel=1e-12)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        # The examples in the documentation of the web UI's parse_prompt_attention.
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.1 * 1.1 * 1.3),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 1.1 * 0.5),
                (", sun, ", 1.1),
                ("sky", 1.1**4),
                (".", 1.1),
            ],
        ),
        # What follows from its rules: a symbol that matches nothing is text.
        ("", [("", 1.0)]),
        ("([])", [("", 1.0)]),
        ("a) b] c:1.2) :)", [("a) b] c:1.2) :)", 1.0)]),
        ("[a:0.5]", [("a:0.5", 1 / 1.1)]),
        ("(a:) (b:1.2.3) (c: -0.5 )", [("a:", 1.1), (" ", 1.0), ("b:1.2.3", 1.1), (" ", 1.0), ("c", -0.5)]),
        ("(a:+2)(b:.5)(c:3.)", [("a", 2.0), ("b", 0.5), ("c", 3.0)]),
        ("(a:1e3)(b:٣)", [("a:1e3b:٣", 1.1)]),
        ("(a [b) c] d", [("a ", 1.1), ("b", 1.0), (" c", 1 / 1.1), (" d", 1.0)]),
        ("[a (b", [("a ", 1 / 1.1), ("b", 1.0)]),
        # A backslash goes, and what follows is read as without it, unless it is a bracket or another backslash.
        (r"\\(a) \b", [("\\", 1.0), ("a", 1.1), (" b", 1.0)]),
        (r"(\<3\, (a\:1.2)\:0.5)", [("<3, ", 0.5), ("a", 0.5 * 1.2)]),
        ("\\", [("", 1.0)]),
        ("tail\\", [("tail", 1.0)]),
        ("\\\\\\", [("\\", 1.0)]),
        ("a\\\nb", [("a\nb", 1.0)]),
        # BREAK, a word of its own, with the blanks around it.
        ("a BREAK b", [("a", 1.0), BREAK, ("b", 1.0)]),
        ("BREAK", [BREAK]),
        (" BREAK\n\tBREAK,b", [BREAK, BREAK, (",b", 1.0)]),
        ("(a)BREAK[b]:BREAK", [("a", 1.1), BREAK, ("b", 1 / 1.1), (":", 1.0), BREAK]),
        (r"\BREAK\\BREAK\(BREAK", [BREAK, ("\\", 1.0), BREAK, ("(", 1.0), BREAK]),
        ("BREAKS unBREAK BREAK_ Break BREAK1", [("BREAKS unBREAK BREAK_ Break BREAK1", 1.0)]),
        # Within brackets it is multiplied as the texts are, and marks a break only if it is -1 in the end.
        ("(a BREAK b) c", [("a", 1.1), ("BREAK", -1.1), ("b", 1.1), (" c", 1.0)]),
        ("(a BREAK b", [("a", 1.1), ("BREAK", -1.1), ("b", 1.1)]),
        ("(a BREAK b:1)", [("a", 1.0), BREAK, ("b", 1.0)]),
        ("([a BREAK b])", [("a", 1.0), BREAK, ("b", 1.0)]),
        ("(a BREAK b:0)", [("aBREAKb", 0.0)]),
        ("(a BREAK b:-1)", [("a", -1.0), ("BREAK", 1.0), ("b", -1.0)]),
        ("(a:-1) BREAK (b:-1)", [("a", -1.0), BREAK, ("b", -1.0)]),
        # Bounds.
        ("(a:99)(b:-99)(c:" + "9" * 400 + ")", [("a", 10.0), ("b", -10.0), ("c", 10.0)]),
        ("((a:9):9)", [("a", 10.0)]),
        ("(" * 5000 + "a(b:0)", [("a", 10.0), ("b", 0.0)]),
        ("[" * 8000 + "a", [("a", 0.0)]),
    ],
)
def test_examples(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert_close(parse_prompt(prompt), expected)


@given(TEXTS)
def test_any_text_is_a_prompt(prompt: str) -> None:
    texts = parse_prompt(prompt)
    assert texts
    assert texts == [("", 1.0)] or all(text for text, _ in texts)
    assert all(math.isfinite(weight) and abs(weight) <= MAX_WEIGHT for _, weight in texts)
    assert all(one[1] != other[1] for one, other in pairwise(texts) if BREAK not in (one, other))
    remaining = iter(prompt)  # nothing is added, and the order stays
    assert all(letter in remaining for letter, _ in letters(texts))


PIECES = [
    *["(", "(", "[", ")", "]", ":1.3)", ": 0.5 )", ":-1)", ":1)", ":+2)", ":x)"],
    *["\\", "\\(", "\\]", "\\\\", "a", "b, ", " ", "\n", "é", ":", "1.2", "AND", "_"],
    *["BREAK", "BREAK", " BREAK ", "BREAKS"],
]


@settings(max_examples=2000)
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_any_prompt_is_read_as_the_web_ui_reads_it(prompt: str) -> None:
    expected = [(text, weight) for text, weight in read_prompt(prompt) if text] or [("", 1.0)]
    # Products are taken in another order here. What is off by rounding only is neither a break nor one text there.
    weights = [weight for _, weight in expected]
    assume(all(one == other or abs(one - other) > 1e-9 for one in (*weights, -1.0) for other in weights))
    assume(all(abs(weight) < MAX_WEIGHT for weight in weights))
    assert_close(parse_prompt(prompt), expected)


@given(TEXTS)
def test_escaped_text_means_itself(text: str) -> None:
    assume("BREAK" not in text)
    assert parse_prompt(escaped(text)) == [(text, 1.0)]
    if text:
        assert parse_prompt(f"({escaped(text)})") == [(text, 1.1)] or ":" in text


@given(st.text(alphabet=st.characters(exclude_characters=SPECIAL)))
def test_text_without_special_characters_is_untouched(text: str) -> None:
    assume("BREAK" not in text)
    assert parse_prompt(text) == [(text, 1.0)]


def bracketed(inside: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Prompts with the letters and weights that they should have, one level of brackets around those of `inside`."""
    inner = st.lists(inside, max_size=3).map(
        lambda parts: ("".join(prompt for prompt, _ in parts), [each for _, expected in parts for each in expected])
    )

    def around(opening: str, closing: str, factor: float) -> st.SearchStrategy[Any]:
        return inner.map(
            lambda part: (
                opening + part[0] + closing,
                [(letter, factor * weight) for letter, weight in part[1]],
            )
        )

    numbers = st.integers(-1500, 1500).map(lambda thousandths: thousandths / 1000)
    return st.one_of(
        inside,
        around("(", ")", 1.1),
        around("[", "]", 1 / 1.1),
        numbers.flatmap(lambda number: around("(", f":{number})", number)),
    )


_plain = st.text(alphabet=st.characters(exclude_characters=":")).map(
    lambda text: (escaped(text), [(letter, 1.0) for letter in text])
)


@given(bracketed(bracketed(bracketed(_plain))))
def test_nested_weights_multiply(prompt_and_expected: Any) -> None:
    prompt, expected = prompt_and_expected
    assert_close(letters(parse_prompt(prompt)), expected)


@pytest.mark.parametrize(
    "text", ["a" + " " * 2_000_000 + "b", "BREAK " * 100_000, "(" * 300_000, ":" + "\n" * 1_000_000]
)
def test_long_prompts_take_time_in_proportion(text: str) -> None:
    """Two million blanks would take hours otherwise; such a prompt stands still all others."""
    assert parse_prompt(text)
