"""Progress, previews, formats and metadata over the real server."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from diffuserve.errors import DeadlineExceeded
from diffuserve_client import Client, Progress, Result
from tests.gate import Gate


def test_every_step_is_reported_and_previews_when_asked_for(client: Client) -> None:
    events = list(client.stream("a rocket, glossy", steps=6, preview=2, seed=7))
    *progress, result = events
    assert isinstance(result, Result)
    assert [event.step for event in progress if isinstance(event, Progress)] == [0, 1, 2, 3, 4, 5, 6]
    previews = {event.step: event.preview for event in progress if isinstance(event, Progress) and event.preview}
    assert sorted(previews) == [2, 4, 6]
    assert all(preview.size == (16, 16) for preview in previews.values())
    # At the last step the preview shows the finished image, small. The map is linear and the decoder is not, so they
    # are alike rather than equal; the manifest has the fit's error.
    small = result.images[0].resize((16, 16), Image.Resampling.BOX)
    assert np.corrcoef(np.asarray(previews[6]).ravel(), np.asarray(small).ravel())[0, 1] > 0.5


@pytest.mark.parametrize("format", ["png", "jpeg", "webp", "raw"])
def test_each_format_decodes_to_the_same_picture(client: Client, format: str) -> None:
    result = client.generate("a red heart, flat", seed=3, steps=8, format=format, negative_prompt="blue")
    image = result.images[0]
    assert image.size == (128, 128)
    [text] = result.parameters
    assert text.startswith(
        "a red heart, flat\nNegative prompt: blue\n"
        "Steps: 8, Sampler: DPM++ 2M, Schedule type: SGM Uniform, CFG scale: 4, Seed: 3, Size: 128x128, Model: tiny-emoji"
    )
    if format == "png":
        assert image.info["parameters"] == text
    elif format != "raw":
        comment = image.getexif().get_ifd(0x8769)[0x9286]
        assert comment == b"UNICODE\0" + text.encode("utf-16-be")


def test_a_long_prompt_is_cut_with_a_warning(client: Client) -> None:
    assert client.generate("glossy " * 40, steps=2).warnings == []  # two chunks
    result = client.generate("glossy " * 300 + "the end", steps=2)
    assert len(result.warnings) == 1
    assert "the end" in result.warnings[0]
    assert client.generate("", steps=2).warnings == []


def test_prompt_syntax_that_is_drawn_as_text_is_warned_about(client: Client) -> None:
    [lora, alternation] = client.generate("a [cat|dog] <lora:style:1>", steps=2).warnings
    assert "LoRA" in lora
    assert "alternate" in alternation


def test_a_request_that_runs_out_of_time_says_so(client: Client, gate: Gate) -> None:
    with gate.closed(), pytest.raises(DeadlineExceeded, match="100"):
        client.generate("a rocket", steps=150, num_images=16, timeout_s=0.1)
