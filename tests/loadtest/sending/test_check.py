"""Whether an answer is what was asked for."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image

from diffuserve_loadtest.sending.check import WrongImage, check_images
from diffuserve_loadtest.workload.arrivals import Closed
from diffuserve_loadtest.workload.plan import PlannedRequest, plan
from diffuserve_loadtest.workload.workload import Requests, Workload


def asked(**fields: Any) -> PlannedRequest:
    return plan(Workload("A test.", Closed(1), (Requests(**fields),)), 0)


def image(width: int, height: int, format: str = "png") -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((width, height), 50).save(stream, format)
    return stream.getvalue()


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_the_right_images_pass_and_their_size_is_told(format: str) -> None:
    assert check_images(asked(width=64, height=96), [image(64, 96, format)], None) == (64, 96)
    assert check_images(asked(num_images=2), [image(32, 32, format)] * 2, None) == (32, 32)


@pytest.mark.parametrize(
    ("fields", "files", "words"),
    [
        ({}, [], "0 images came"),
        ({"num_images": 2}, [image(64, 64)], "1 images came; 2"),
        ({}, [b"no image"], "cannot be decoded"),
        ({}, [image(64, 64)[:-100]], "cannot be decoded"),
        ({"width": 64, "height": 64}, [image(64, 96)], "64 x 96; 64 x 64"),
        ({"num_images": 2}, [image(64, 64), image(64, 32)], "sizes"),
        ({}, [image(64, 64)], "64 x 64; 128 x 128"),  # others without a size were of another
    ],
)
def test_wrong_ones_are_told_apart(fields: dict[str, Any], files: list[bytes], words: str) -> None:
    with pytest.raises(WrongImage, match=words):
        check_images(asked(**fields), files, (128, 128))
