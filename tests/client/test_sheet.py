"""Contact sheets."""

from io import BytesIO

import pytest
from PIL import Image

from diffuserve_client.sheet import columns_for, contact_sheet, encode_sheet


@pytest.mark.parametrize(
    ("counts", "columns"),
    [([1], 1), ([2], 2), ([5], 3), ([16], 4), ([1, 1, 1, 1], 2), ([3, 3], 3), ([2, 3], 3)],
)
def test_columns(counts: list[int], columns: int) -> None:
    assert columns_for(counts) == columns


def test_images_keep_their_order_and_odd_sizes_are_centred() -> None:
    images = [Image.new("RGB", (4, 4), "red"), Image.new("L", (4, 4), 0), Image.new("RGB", (2, 2), "blue")]
    sheet = contact_sheet(images, columns=2)
    assert sheet.size == (8, 8)
    assert sheet.getpixel((0, 0)) == (255, 0, 0)
    assert sheet.getpixel((4, 0)) == (0, 0, 0)
    assert sheet.getpixel((0, 4)) == (255, 255, 255)
    assert sheet.getpixel((1, 5)) == (0, 0, 255)
    assert sheet.getpixel((7, 7)) == (255, 255, 255)


def test_png_carries_all_texts_once() -> None:
    data = encode_sheet(Image.new("RGB", (4, 4)), "png", ["pizza 🍕\nSeed: 1", "cat", "cat"])
    assert Image.open(BytesIO(data)).info["parameters"] == "pizza 🍕\nSeed: 1\n\ncat"


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_exif_carries_the_texts(format: str) -> None:
    data = encode_sheet(Image.new("RGB", (4, 4)), format, ["a", "b"])
    comment = Image.open(BytesIO(data)).getexif().get_ifd(0x8769)[0x9286]
    assert comment == b"UNICODE\0" + "a\n\nb".encode("utf-16-be")


def test_long_texts_fit_into_jpeg() -> None:
    texts = [f"{index} " + "x" * 5000 for index in range(50)]
    assert Image.open(BytesIO(encode_sheet(Image.new("RGB", (4, 4)), "jpeg", texts))).size == (4, 4)
