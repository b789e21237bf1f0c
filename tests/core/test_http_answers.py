from __future__ import annotations

import json

import numpy as np
import pytest

from diffuserve.errors import (
    Cancelled,
    DeadlineExceeded,
    DiffuserveError,
    Draining,
    InvalidRequest,
    QueueFull,
    StageFailed,
    from_wire,
)
from diffuserve.events import Accepted, Completed, Progressed
from diffuserve.http_answers import HTTP_STATUS, answer_from_completed, answer_from_error, json_from_event
from diffuserve.request import TextToImageRequest


def request(**changes: object) -> TextToImageRequest:
    fields = {
        "prompt": "a",
        "negative_prompt": "",
        "steps": 3,
        "guidance_scale": 1.0,
        "seed": 7,
        "width": 64,
        "height": 32,
        "sampler": "euler",
        "encoding": "binary",
    }
    return TextToImageRequest(**{**fields, **changes})  # type: ignore[arg-type]


def completed(images: int) -> Completed:
    pixels = np.zeros((images, 32, 64, 3), np.uint8)
    seeds = tuple(range(7, 7 + images))
    return Completed((b"\x89PNG",) * images, pixels, (False,) * images, seeds, ("ä",) * images, (), 0.25, 0.5, 1.0)


def test_one_image_is_its_file() -> None:
    for format, media_type in (("png", "image/png"), ("jpeg", "image/jpeg"), ("raw", "application/octet-stream")):
        answer = answer_from_completed(completed(1), request(format=format))
        assert (answer.body, answer.media_type, answer.status, answer.reason) == (b"\x89PNG", media_type, 200, "OK")


@pytest.mark.parametrize(("images", "encoding"), [(2, "binary"), (1, "base64")])
def test_several_or_base64_are_json(images: int, encoding: str) -> None:
    answer = answer_from_completed(completed(images), request(num_images=images, encoding=encoding))
    assert answer.media_type == "application/json"
    values = json.loads(answer.body)
    assert values["image"] == ["iVBORw=="] * images
    assert values["seed"] == list(range(7, 7 + images))
    assert (values["event"], values["width"], values["height"], values["total_s"]) == ("completed", 64, 32, 1.0)
    assert (values["parameters"], values["warnings"]) == (["ä"] * images, [])


def test_events() -> None:
    assert json.loads(json_from_event(Accepted(3, 2), request())) == {
        "event": "accepted",
        "step": 0,
        "steps": 3,
        "position": 2,
    }
    progress = json.loads(json_from_event(Progressed(1, 3, 0.5, (b"\x89PNG",)), request()))
    assert progress == {"event": "progress", "step": 1, "steps": 3, "eta_s": 0.5, "preview": ["iVBORw=="]}


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (InvalidRequest("no"), 400, "Bad Request"),
        (Cancelled("no"), 499, "Client Closed Request"),
        (StageFailed("no"), 500, "Internal Server Error"),
        (QueueFull("no", 2.5), 503, "Service Unavailable"),
        (Draining("no"), 503, "Service Unavailable"),
        (DeadlineExceeded("no"), 504, "Gateway Timeout"),
    ],
)
def test_errors(error: DiffuserveError, status: int, reason: str) -> None:
    answer = answer_from_error(error)
    assert (answer.status, answer.reason, answer.media_type) == (status, reason, "application/json")
    body = json.loads(answer.body)
    assert (body["code"], body["type"]) == (status, type(error).__name__)
    assert type(from_wire(body["message"])) is type(error)
    assert answer.headers == ({"Retry-After": "3"} if isinstance(error, QueueFull) else {})
    assert type(error) in HTTP_STATUS
