from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import msgspec
import pytest

from diffuserve.errors import InvalidRequest
from diffuserve.limits import Limits
from diffuserve.request import MAX_SEED, TextToImageRequest, request_from_fields
from diffuserve.samplers import SAMPLERS
from tests.core.fakes import MODEL

LIMITS = Limits(
    max_steps=20, max_side_px=130, max_guidance_scale=10.0, max_images=4, max_prompt_bytes=12, max_waiting_requests=9
)


def parse(**values: Any) -> TextToImageRequest:
    return request_from_fields({"prompt": "a cat", **values}, MODEL, LIMITS)


def refusal(**values: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        parse(**values)
    return str(caught.value)


def test_defaults_come_from_the_model() -> None:
    request = parse(seed=3)
    assert request == TextToImageRequest(
        prompt="a cat",
        negative_prompt="",
        steps=MODEL.default_steps,
        guidance_scale=MODEL.default_guidance_scale,
        seed=3,
        width=MODEL.width,
        height=MODEL.height,
        sampler=MODEL.default_sampler,
    )
    nothing = {field.name: None for field in fields(TextToImageRequest)}
    assert parse(**{**nothing, "prompt": "a cat", "seed": 3}) == request


def test_a_default_beyond_a_limit_is_the_limit() -> None:
    limits = Limits(max_steps=5, max_guidance_scale=3.0, max_side_px=40)
    request = request_from_fields({"prompt": ""}, MODEL, limits)
    assert MODEL.default_guidance_scale > 3
    assert (request.steps, request.guidance_scale, request.width, request.height) == (5, 3.0, 32, 32)


def test_an_image_whose_rows_do_not_fit_into_a_call_is_refused() -> None:
    limits = Limits(max_rows=1)
    for guided in ({}, {"guidance_scale": 1.5}):
        with pytest.raises(InvalidRequest) as caught:
            request_from_fields({"prompt": "", **guided}, MODEL, limits)
        assert str(caught.value) == (
            f"guidance_scale is {guided.get('guidance_scale', 3.5)}, with which an image takes 2 UNet rows; this server's "
            "max_rows is 1. Ask for a guidance_scale of 1 or less, or have the server assembled with --limit max_rows=2 or "
            "more."
        )
    assert request_from_fields({"prompt": "", "guidance_scale": 1}, MODEL, limits).rows == 1
    embedded = msgspec.structs.replace(MODEL, guidance_embedded=True)
    assert request_from_fields({"prompt": "", "guidance_scale": 8}, embedded, limits).rows == 1


def test_a_seed_is_drawn_where_none_is_given() -> None:
    drawn = {parse().seed for _ in range(20)}
    assert len(drawn) > 1
    assert all(0 <= seed <= MAX_SEED for seed in drawn)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("steps", 1, 20),
        ("guidance_scale", 0, 10),
        ("seed", 0, MAX_SEED),
        ("num_images", 1, 4),
        ("priority", 0, 9),
        ("timeout_ms", 0, 24 * 3600 * 1000),
        ("preview", 0, 20),
    ],
)
def test_bounds(name: str, low: int, high: int) -> None:
    for allowed in (low, high):
        assert getattr(parse(**{name: allowed}), name) == allowed
    for refused in (low - 1, high + 1):
        assert refusal(**{name: refused}) == f"{name} is {refused}; it must be from {low} to {high}."
    for wrong_type in ("3", b"3", [3], *(() if name == "preview" else (True, False))):
        kind = "number" if name == "guidance_scale" else "whole number"
        expected = f"{name} is {wrong_type!r}; it must be a {kind} from {low} to {high}."
        assert refusal(**{name: wrong_type}) == expected
    if name != "guidance_scale":
        assert refusal(**{name: 3.0}).startswith(f"{name} is 3.0; it must be a whole number")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.001, 10.000001, 1e39])
def test_guidance_that_is_not_a_number_in_range(value: float) -> None:
    message = refusal(guidance_scale=value)
    assert message.startswith(f"guidance_scale is {value}; it must be from 0 to 10")


@pytest.mark.parametrize("name", ["guidance_scale", "steps", "width", "progress", "format"])
@pytest.mark.parametrize("value", [10**400, "9" * 1_000_000, [1] * 1_000_000], ids=["number", "text", "list"])
def test_a_value_of_any_length_is_shown_in_part(name: str, value: Any) -> None:
    message = refusal(**{name: value})
    start = repr(value).lstrip("'")[:30]
    assert start in message
    assert len(message) < 250


@pytest.mark.parametrize(("scale", "guided"), [(0, False), (1, False), (1.0001, True), (7.5, True)])
def test_guidance_up_to_one_is_none(scale: float, guided: bool) -> None:
    request = parse(guidance_scale=scale)
    assert request.guided is guided
    assert isinstance(request.guidance_scale, float)


@pytest.mark.parametrize("name", ["width", "height"])
def test_sizes(name: str) -> None:
    for allowed in (16, 112, 128):  # 130, rounded down to the model's multiple
        assert getattr(parse(**{name: allowed}), name) == allowed
    for refused in (0, -16, 8, 144, 2**31 - 1):
        assert refusal(**{name: refused}) == f"{name} is {refused} px; it must be a multiple of 16 from 16 to 128."
    for refused, nearest in ((17, "16 or 32"), (100, "96 or 112"), (127, "112 or 128")):
        assert refusal(**{name: refused}).endswith(
            f"{refused} px; this model needs a multiple of 16. Nearest: {nearest}."
        )
    for wrong_type in (True, 64.0, "64"):
        assert refusal(**{name: wrong_type}).startswith(f"{name} is {wrong_type!r} px; it must be a multiple of 16")
    assert refusal(**{name: 2**31}).startswith(f"{name} is {2**31} px; it must be")


@pytest.mark.parametrize(
    ("name", "allowed"),
    [("sampler", tuple(SAMPLERS)), ("format", ("png", "jpeg", "webp", "raw")), ("encoding", ("base64", "binary"))],
)
def test_choices(name: str, allowed: tuple[str, ...]) -> None:
    for value in allowed:
        assert getattr(parse(**{name: value}), name) == value
        assert getattr(parse(**{name: value.encode()}), name) == value
    for refused in ("", "PNG", "Euler", 1, True, ["png"]):
        assert refusal(**{name: refused}) == f"{name} is {refused!r}; it must be one of {', '.join(allowed)}."
    assert refusal(**{name: "x" * 1000}).startswith(f"{name} is '{'x' * 40}...'; it must be")
    assert refusal(**{name: b"\xff"}).startswith(f"{name} is '\ufffd'; it must be")


def test_progress_is_a_bool() -> None:
    assert parse(progress=True).progress is True
    for refused in (1, 0, "true", b"false"):
        assert refusal(progress=refused) == f"progress is {refused!r}; it must be true or false."


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_texts(name: str) -> None:
    for value, text in (("", ""), (b"", ""), ("Grüße", "Grüße"), ("Grüße".encode(), "Grüße"), ("😀" * 3, "😀" * 3)):
        assert getattr(parse(**{name: value}), name) == text
    for refused in ("a" * 13, "😀" * 3 + "a", b"a" * 13):
        assert refusal(**{name: refused}) == f"{name} has 13 bytes; at most 12 are allowed. Shorten it."
    assert refusal(**{name: b"ab\xff"}) == f"{name} is not UTF-8 (invalid start byte at byte 2). Encode it as UTF-8."
    assert refusal(**{name: "a\ud800"}) == f"{name} has a lone surrogate at position 1; it must be valid Unicode."
    assert refusal(**{name: 5}) == f"{name} is of type int; it must be text."


@pytest.mark.parametrize("values", [{}, {"prompt": None}])
def test_a_prompt_is_needed(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="prompt is missing"):
        request_from_fields(values, MODEL, LIMITS)


def test_unknown_fields_are_named() -> None:
    message = refusal(cfg=7, a_name_that_goes_on_and_on_and_on_and_on_and_on=1)
    assert message.startswith(
        "Unknown: 'a_name_that_goes_on_and_on_and_on_and_on...', 'cfg'. A request has these fields: "
    )
    listed = message.split("fields: ")[1].rstrip(".").split(", ")
    assert listed == [field.name for field in fields(TextToImageRequest)]


def test_many_unknown_fields_make_a_short_answer() -> None:
    message = refusal(**{f"x{number:05}" + "\n\x1b[31m\u202e" * 9: 1 for number in range(20_000)})
    assert message.startswith("Unknown: 'x00000")
    assert " and 19997 more. A request has" in message
    assert len(message) < 1000
    assert message.isprintable()
    assert "Unknown: 'a', 'b', 'c'. A" in refusal(a=1, b=2, c=3)
    assert "Unknown: 'a', 'b', 'c' and 1 more. A" in refusal(a=1, b=2, c=3, d=4)


def test_a_preview_of_every_step_may_be_true() -> None:
    assert [parse(preview=value).preview for value in (True, False, 1, 0)] == [1, 0, 1, 0]
    assert type(parse(preview=True).preview) is int


def test_each_image_has_a_seed_and_seeds_wrap() -> None:
    assert parse(seed=5, num_images=3).seeds == (5, 6, 7)
    assert parse(seed=MAX_SEED - 1, num_images=4).seeds == (MAX_SEED - 1, MAX_SEED, 0, 1)


def test_limits_of_a_model() -> None:
    limits = Limits.for_model(MODEL)
    assert limits == Limits(max_side_px=128)
    assert Limits.from_parameters(MODEL, {"policy": "fair"}) == limits
