"""From what TorchServe hands over to requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffuserve.bundle.manifest import ModelSpec
from diffuserve.errors import InvalidRequest
from diffuserve.limits import Limits
from diffuserve_handlers.requests import Received, received_from_data

MODEL = ModelSpec(
    name="tiny",
    family="stable-diffusion",
    latent_channels=4,
    hidden_size=8,
    max_tokens=16,
    vae_scale_factor=8,
    size_multiple=32,
    width=64,
    height=64,
    default_steps=20,
    default_guidance_scale=5.0,
    default_sampler="euler",
)
HTTP = {"Host": "localhost", "body": {"content-type": "application/json"}}
GRPC = {"data": {"content-type": ""}}


def receive(inputs: dict[str, Any], headers: dict[str, Any]) -> Received:
    return received_from_data(inputs, headers, MODEL, Limits.for_model(MODEL))


@pytest.mark.parametrize(
    ("inputs", "headers", "http"),
    [
        ({"body": {"prompt": "ä", "steps": 3}}, HTTP, True),
        ({"body": '{"prompt": "ä", "steps": 3}'.encode()}, HTTP, True),
        ({"prompt": bytearray("ä".encode()), "steps": b"3"}, HTTP, True),
        ({"data": '{"prompt": "ä", "steps": 3}'.encode()}, GRPC, False),
        ({"stream": '{"prompt": "ä", "steps": 3}'.encode()}, {**GRPC, "ts_request_sequence_id": "x"}, False),
        ({"prompt": "ä".encode(), "steps": b"3"}, GRPC, False),
    ],
)
def test_the_forms_of_a_request(inputs: dict[str, Any], headers: dict[str, Any], http: bool) -> None:
    received = receive(inputs, headers)
    request = received.checked()
    assert (request.prompt, request.steps, request.encoding) == ("ä", 3, "binary")
    assert received.http is http
    assert not received.streamed


@pytest.mark.parametrize(
    "inputs", [{"body": b'{"describe": true}'}, {"describe": b"true"}, {"data": b'{"describe": true}'}]
)
def test_a_description_is_asked_for(inputs: dict[str, Any]) -> None:
    received = receive(inputs, HTTP)
    assert received.request is None
    assert not received.streamed
    with pytest.raises(InvalidRequest, match="which is not drawn"):
        received.checked()


def test_text_becomes_what_the_field_is() -> None:
    fields = {"prompt": b"7", "guidance_scale": b"2.5", "seed": b"4294967295", "progress": b"False", "num_images": b"2"}
    request = receive(fields, HTTP).checked()
    assert request.prompt == "7"
    assert (request.guidance_scale, request.seed, request.progress, request.num_images) == (2.5, 2**32 - 1, False, 2)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "no fields"),
        ({'{"prompt": "a"}': b""}, "Content-Type: application/json"),
        ({"body": b"{"}, "not valid JSON"),
        ({"body": b"[" * 100_000}, "not valid JSON"),
        ({"body": b'"text"'}, "type str"),
        ({"body": b"{}"}, "prompt is missing"),
        ({"body": b"{}", "steps": b"3"}, "there are also: steps"),
        ({"prompt": b"\xff"}, "prompt is not UTF-8"),
        ({"prompt": b"a", "steps": b"3.5"}, "steps is '3.5'"),
        ({"prompt": b"a", "steps": b"4294967298"}, "steps is 4294967298; it must be from 1 to 150"),
        ({"prompt": b"a", "steps": b"1_0"}, "steps is '1_0'; it must be a whole number"),
        ({"prompt": b"a", "width": "\u0666\u0664".encode()}, "width is '\u0666\u0664' px"),
        ({"prompt": b"a", "guidance_scale": b"nan"}, "guidance_scale is 'nan'; it must be a number from 0 to 50"),
        ({"body": b'{"prompt": "a", "priority": 4294967298}'}, "priority is 4294967298; it must be from 0 to 9"),
        ({"body": b'{"prompt": "a", "seed": 18446744073709551615}'}, "seed is 18446744073709551615; it must be"),
        ({"prompt": b"a", "progress": b"perhaps"}, "progress"),
        ({"prompt": b"a", "color": b"red"}, "Unknown: 'color'"),
    ],
)
def test_what_is_wrong_is_said(inputs: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        receive(inputs, HTTP).checked()


def test_progress_needs_a_call_that_says_it_is_streamed() -> None:
    body = b'{"prompt": "a", "progress": true}'
    assert receive({"stream": body}, GRPC).streamed
    for inputs, headers in (({"data": body}, GRPC), ({"body": body}, HTTP), ({"stream": body}, HTTP)):
        received = receive(inputs, headers)
        assert not received.streamed
        with pytest.raises(InvalidRequest, match="StreamPredictions"):
            received.checked()


def test_the_bundled_model_needs_nothing_more(bundle: Path) -> None:
    from diffuserve.bundle.manifest import read_manifest

    model = read_manifest(bundle).model
    received = received_from_data({"body": {"prompt": "a cat"}}, HTTP, model, Limits.for_model(model))
    assert received.checked().width == model.width
