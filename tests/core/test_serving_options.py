"""Limits and serving options: their ranges, and the way to text and back."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from diffuserve.errors import ConfigurationError
from diffuserve.limits import Limits, max_batch_sizes
from diffuserve.options import changed, options_of, to_parameters
from diffuserve.serving_options import Serving, limits_and_serving
from tests.core.fakes import MODEL

LIMITS = [field.name for field in fields(Limits)]
# Values other than the defaults, as an operator writes them.
WRITTEN = {
    "max_steps": ("200", 200),
    "max_side_px": ("256", 256),
    "max_guidance_scale": ("7.5", 7.5),
    "batching": ("request", "request"),
    "policy": ("fair", "fair"),
    "unet_instances": ("2", 2),
    "call_timeout_s": ("0.5", 0.5),
    "require_safety_checker": ("true", True),
}


def test_a_model_has_its_own_defaults() -> None:
    assert Limits.for_model(MODEL) == replace(Limits(), max_side_px=128)
    assert limits_and_serving(MODEL, {}) == (Limits.for_model(MODEL), Serving())


def test_all_that_is_written_is_read_again() -> None:
    limits, serving = limits_and_serving(MODEL, {name: text for name, (text, _) in WRITTEN.items()})
    for name, (_, value) in WRITTEN.items():
        found = getattr(serving if hasattr(serving, name) else limits, name)
        assert (found, type(found)) == (value, type(value))
    assert {*changed(limits, Limits()), *changed(serving, Serving())} == set(WRITTEN)
    parameters = to_parameters(limits, serving)
    assert set(parameters) == {*LIMITS, *(field.name for field in fields(Serving))}
    assert limits_and_serving(MODEL, parameters) == (limits, serving)


@pytest.mark.parametrize("name", LIMITS)
def test_what_is_not_a_number_or_out_of_range_is_refused(name: str) -> None:
    one = options_of(Limits)[name]
    kind = "a number" if name == "max_guidance_scale" else "a whole number"
    texts = ["", "x", "0", "-3", "nan", "inf", "1e999", "9" * 5000, f"{one.most + 1:.15g}"]
    for text in [*texts, *(["7.5", "1e3"] if kind == "a whole number" else [])]:
        message = f"{name} is .*; it must be {kind} from {one.least} to {one.most}."
        with pytest.raises(ConfigurationError, match=message):
            limits_and_serving(MODEL, {name: text})
    assert getattr(Limits(**{name: one.most}), name) == one.most
    with pytest.raises(ConfigurationError, match=f"{name} is {one.most + 1}; it must be {kind} from"):
        Limits(**{name: one.most + 1})


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"max_stepps": "3"}, "There is no parameter 'max_stepps'. There are: max_steps, "),
        ({"MAX_STEPS": "3"}, "There is no parameter 'MAX_STEPS'. There are: max_steps, "),
        ({"batching": "sometimes"}, "batching is 'sometimes'; it must be one of inflight, request, none."),
        ({"policy": "lottery"}, "policy is 'lottery'; it must be one of fifo, fair, srpt."),
        ({"require_safety_checker": "maybe"}, "require_safety_checker is 'maybe'; it must be true or false."),
        ({"call_timeout_s": "0"}, "call_timeout_s is 0.0; it must be a number from 0.001 to 86400."),
        ({"max_side_px": "8"}, "max_side_px is 8; the smallest image of fake has 16 px."),
    ],
)
def test_other_mistakes_are_named(parameters: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        limits_and_serving(MODEL, parameters)


@pytest.mark.parametrize("wrong", [{"batching": "sometimes"}, {"policy": "lottery"}, {"unet_instances": 0}])
def test_there_is_no_value_that_may_not_be_used(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="it must be"):
        Serving(**wrong)


def test_a_stage_takes_as_many_rows_as_the_limits_allow() -> None:
    rows = max_batch_sizes(replace(Limits(), max_rows=4, max_prompt_chunks=6))
    assert (rows["unet"], rows["text_encoder"]) == (4, 6)
    assert max_batch_sizes(replace(Limits(), max_rows=64))["text_encoder"] == 64


def test_the_documented_limits_are_the_real_ones() -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    for each in options_of(Limits).values():
        default = each.default_words or f"{each.default:g}"
        assert f"| `{each.name}` | {default} | {each.least} | {each.most} | {each.meaning} |\n" in page
