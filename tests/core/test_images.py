"""Image files, previews, and the text that images carry."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from diffuserve.bundle.manifest import Preview
from diffuserve.images.encoding import encode_image
from diffuserve.images.previews import preview_from_latents
from diffuserve.trials.similarity import psnr_db
from tests.core.fakes import PREVIEW

TEXTS = ["plain ASCII", "Grüße", "日本語 😀 \u200b", "lines\nand \t tabs", "", "long " * 6500]


def _pixels() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """A smooth picture of unequal sides, so that lossy formats keep it and swapped axes or channels show."""
    y, x = np.mgrid[0:24, 0:40]
    return np.stack([x * 6, y * 10, 255 - x * 3 - y * 2], axis=2).astype(np.uint8)


PIXELS = _pixels()


def text_of(image: Image.Image, format: str) -> str:
    if format == "png":
        return str(image.info.get("parameters", ""))
    exif = image.getexif()
    comment = exif.get_ifd(0x8769).get(0x9286, b"UNICODE\0")
    assert comment[:8] == b"UNICODE\0"
    assert exif.endian == ">"  # readers that go by the file's byte order agree with those that take big-endian
    return str(comment[8:].decode("utf-16-be"))


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:8].strip() or "empty")
@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_files(format: str, text: str) -> None:
    with Image.open(io.BytesIO(encode_image(PIXELS, format, text))) as image:
        assert image.format == format.upper()
        assert (image.size, image.mode) == ((40, 24), "RGB")
        assert text_of(image, format) == text
        if format == "png":
            np.testing.assert_array_equal(np.asarray(image), PIXELS)
        else:
            assert psnr_db(image, PIXELS) > 35


@pytest.mark.parametrize("format", ["jpeg", "webp"])
@pytest.mark.parametrize("character", ["a", "é", "😀"])
def test_prompts_that_a_comment_cannot_hold_are_cut_and_the_settings_are_not(format: str, character: str) -> None:
    settings = "Steps: 20, Sampler: Euler, CFG scale: 7"
    text = f"{'x' if character == 'a' else ''}{character * 40_000}\nNegative prompt: {character * 40_000}\n{settings}"
    with Image.open(io.BytesIO(encode_image(PIXELS, format, text))) as image:
        *prompts, last = text_of(image, format).split("\n")
    assert last == settings
    assert text.startswith("\n".join(prompts))
    assert 64_900 < len("\n".join([*prompts, last]).encode("utf-16-be")) <= 65_000


def test_raw_is_the_pixels() -> None:
    assert encode_image(PIXELS, "raw", "ignored") == PIXELS.tobytes()
    assert encode_image(np.asfortranarray(PIXELS), "raw") == PIXELS.tobytes()


def test_preview_equals_a_plain_computation() -> None:
    latents = np.random.default_rng(0).standard_normal((4, 3, 5)).astype(np.float32)
    pixels = preview_from_latents(latents, PREVIEW)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (3, 5, 3))
    for y, x, channel in np.ndindex(3, 5, 3):
        value = PREVIEW.bias[channel] + sum(float(latents[c, y, x]) * PREVIEW.matrix[c][channel] for c in range(4))
        assert abs(int(pixels[y, x, channel]) - min(max(value, 0), 1) * 255) <= 0.51


def test_previews_are_clipped() -> None:
    identity = Preview(matrix=((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)), bias=(0, 0, 0), rmse=0)
    latents = np.array([-3, 1.001, 1e30, 0], np.float32).reshape(4, 1, 1)
    assert preview_from_latents(latents, identity).tolist() == [[[0, 255, 255]]]
