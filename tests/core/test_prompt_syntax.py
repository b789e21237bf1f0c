from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffuserve.text.prompt_syntax import unread_syntax

KINDS = ["<lora:...>", "<lyco:...>", "<hypernet:...>", "AND", "[from:to:when]", "[this|that]", "BREAK within brackets"]


def kinds(prompt: str, *, negative: bool = False) -> list[str]:
    """What is found, by the words that it begins with."""
    found = unread_syntax(prompt, negative=negative)
    assert all(len(each) < 150 for each in found)
    return [kind for each in found for kind in KINDS if each.startswith(kind)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        # Networks.
        ("a cat <lora:style:0.8>, <lora:other:1>", ["<lora:...>"]),
        ("<lyco:x><hypernet:a:1><LORA:y:1>", ["<lora:...>", "<lyco:...>", "<hypernet:...>"]),
        ("<lora>, <lora:>, lora:x:1, < lora:x:1>, <embedding:x>, <3 :>, <lora:x", []),
        ("[a<lora:x|y:1>b]", ["<lora:...>"]),
        # Several prompts.
        ("a cat AND a dog :1.2", ["AND"]),
        ("AND", ["AND"]),
        ("black and white, BAND, ANDES, AND_", []),
        ("[a AND b:3]", ["AND"]),  # cut there first, so that the brackets do not match
        # A change on the way: the examples of the web UI's own tests.
        ("a [b:3]", ["[from:to:when]"]),
        ("a [b: 3 ]", ["[from:to:when]"]),
        ("a [[[b]]:2]", ["[from:to:when]"]),
        ("[(a:2):3]", ["[from:to:when]"]),
        ("a [b : c : 1] d", ["[from:to:when]"]),
        ("a[b:[c:d:2]:1]e", ["[from:to:when]"]),
        ("a [unbalanced", []),
        ("a [b:.5] c", ["[from:to:when]"]),
        ("((a][:b:c [d:3]", ["[from:to:when]"]),
        ("[from::0.25]", ["[from:to:when]"]),
        ("[:x:+1e-1]", ["[from:to:when]"]),
        # And what is none.
        ("[word] [[word]] (a:1.2) (a:b) [a:b] [a:b:c] [a:b:c:3] [a:1,5] [a:3)] a:3", []),
        (r"\\[cat:dog:0.5]", ["[from:to:when]"]),  # the backslash itself is escaped, the bracket after it is not
        (r"\[cat:dog:0.5] \[a|b\]", []),
        (r"[cat:dog:0.5\]", []),
        ("(a:b:3)", []),
        # Alternation.
        ("[a|(b:1.1)]", ["[this|that]"]),
        ("[fe|]male [fe|||]male", ["[this|that]"]),
        ("[a|[b:c:3]]", ["[from:to:when]", "[this|that]"]),
        ("(a|b)", []),
        (r"\[a|b\]", []),
        # The grammar knows no bar outside of an alternation, and no backslash at the end: then all is text.
        ("[a:b:3], (a|b)", []),
        ("[a:b:3] | c", []),
        ("[a|b:3] [a|b]", []),
        ("[a|b", []),
        ("[a|b]\\", []),
        ("[a|b]\\\n", []),
        # BREAK.
        ("a BREAK b", []),
        ("(a) BREAK [b]", []),
        ("(a BREAK b)", ["BREAK within brackets"]),
        ("[a BREAK b:1.2) BREAK", ["BREAK within brackets"]),
        ("(a BREAK b:1)", []),
        ("", []),
    ],
)
def test_examples(prompt: str, expected: list[str]) -> None:
    assert kinds(prompt) == expected
    assert kinds(prompt, negative=True) == [kind for kind in expected if kind != "AND"] or "AND" in prompt


def test_a_negative_prompt_knows_no_and() -> None:
    assert kinds("a AND b", negative=True) == []
    assert kinds("[a AND b:3]", negative=True) == ["[from:to:when]"]


@given(st.text(alphabet=st.sampled_from(r"\()[]:|<>") | st.sampled_from("a3. \nAND") | st.characters()))
def test_any_text_is_read(prompt: str) -> None:
    found = unread_syntax(prompt)
    assert len(found) == len(set(found))


@given(st.text(alphabet=st.sampled_from("ab c,.") | st.sampled_from("()[]:")))
def test_attention_is_no_schedule(text: str) -> None:
    """Brackets with numbers only after round ones."""
    words = re.sub(r"[()\[\]:]", "", text)
    assert unread_syntax(f"({words}:1.2) [{words}] (({words}))") == []
