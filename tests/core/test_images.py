"""Image files, previews, and the text that images carry."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffuserve import __version__
from diffuserve.bundle import FusedLora, Preview
from diffuserve.images import encode_image, preview_from_latents
from diffuserve.infotext import infotext
from diffuserve.request import Limits, request_from_fields
from diffuserve.similarity import psnr_db
from tests.core.fakes import MODEL, PREVIEW, make_bundle

TEXTS = ["plain ASCII", "Grüße", "日本語 😀 \u200b", "lines\nand \t tabs", "", "long " * 2900]


def _pixels() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """A smooth picture of unequal sides, so that lossy formats keep it and swapped axes or channels show."""
    y, x = np.mgrid[0:24, 0:40]
    return np.stack([x * 6, y * 10, 255 - x * 3 - y * 2], axis=2).astype(np.uint8)


PIXELS = _pixels()


def _text_of(image: Image.Image, format: str) -> str:
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
        assert _text_of(image, format) == text
        if format == "png":
            np.testing.assert_array_equal(np.asarray(image), PIXELS)
        else:
            assert psnr_db(image, PIXELS) > 35


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


@pytest.mark.parametrize(
    ("sampler", "name"),
    [
        ("ddim", "DDIM"),
        ("euler", "Euler"),
        ("euler_a", "Euler a"),
        ("dpmpp_2m", "DPM++ 2M"),
        ("dpmpp_2m_karras", "DPM++ 2M Karras"),
        ("dpmpp_2m_sde_karras", "DPM++ 2M SDE Karras"),
        ("unipc", "UniPC"),
        ("lcm", "LCM"),
    ],
)
def test_infotext(tmp_path: Path, sampler: str, name: str) -> None:
    manifest = make_bundle(tmp_path)
    fields = {"prompt": "a cat,\nblue", "negative_prompt": "a dog", "steps": 9, "guidance_scale": 4.5}
    request = request_from_fields({**fields, "sampler": sampler, "width": 32}, MODEL, Limits.for_model(MODEL))
    assert infotext(request, manifest, 41) == (
        "a cat,\nblue\n"
        "Negative prompt: a dog\n"
        f"Steps: 9, Sampler: {name}, CFG scale: 4.5, Seed: 41, Size: 32x48, Model hash: 0123456789, Model: fake, "
        f"Engine: onnxruntime fp32, Bundle hash: {manifest.bundle_sha256[:10]}, Version: diffuserve {__version__}"
    )


def test_infotext_without_negative_prompt(tmp_path: Path) -> None:
    request = request_from_fields({"prompt": "", "seed": 1}, MODEL, Limits.for_model(MODEL))
    text = infotext(request, make_bundle(tmp_path), 1)
    assert text.startswith("\nSteps: 7, Sampler: Euler, CFG scale: 3.5, Seed: 1, Size: 64x48, ")
    assert "Negative" not in text


def test_infotext_names_the_loras_in_the_weights(tmp_path: Path) -> None:
    request = request_from_fields({"prompt": "a cat"}, MODEL, Limits.for_model(MODEL))
    loras = (FusedLora("style", 0.8, "ab" * 32), FusedLora('de"tail, fine', -1.0, "cd" * 32))
    text = infotext(request, make_bundle(tmp_path, loras=loras), 1)
    assert (
        r', Model: fake, Fused LoRAs: "style: 0.8, de\"tail, fine: -1", '
        r'Lora hashes: "style: ababababab, de\"tail, fine: cdcdcdcdcd", Engine: '
    ) in text
    assert text.startswith("a cat\nSteps")
