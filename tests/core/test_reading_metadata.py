"""EXIF's orientation and colour profiles: files made with known ones, and what is expected computed here."""

from __future__ import annotations

import io
import itertools
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from diffuserve.images.reading import read_picture
from diffuserve.trials.similarity import psnr_db
from tests.core import picture_files as files

Pixels = NDArray[np.uint8]
Carrier = Callable[[Pixels, bytes], bytes]
DRAW = np.random.default_rng(11)
COLOURS: Pixels = DRAW.integers(0, 256, (256, 3), dtype=np.uint8)
INDICES: Pixels = DRAW.integers(0, 256, (19, 13), dtype=np.uint8)


# EXIF 2.32, table 6: which side of the scene the first row shows, and which the first column.
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def _stored(scene: Pixels, orientation: int) -> Pixels:
    """The scene as a camera held in that way stores it, pixel by pixel."""
    height, width = scene.shape[:2]
    rows, columns = (height, width) if orientation < 5 else (width, height)
    stored = np.empty((rows, columns, 3), np.uint8)
    for row, column in np.ndindex(rows, columns):
        position = {}
        for side, steps in zip(SIDES[orientation], (row, column), strict=True):
            position["y" if side in ("top", "bottom") else "x"] = (side, steps)
        (vertical, down), (horizontal, across) = position["y"], position["x"]
        y = down if vertical == "top" else height - 1 - down
        x = across if horizontal == "left" else width - 1 - across
        stored[row, column] = scene[y, x]
    return stored


def _png_with_exif(pixels: Pixels, block: bytes) -> bytes:
    return files.png(pixels, 8, files.RGB, (b"eXIf", block))


def _jpeg_with_exif(pixels: Pixels, block: bytes) -> bytes:
    data = files.encoded(pixels, "jpeg", quality=97, subsampling=0)
    return files.jpeg_with(data, (0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>"), (0xE1, b"Exif\0\0" + block))


def _webp_with_exif(pixels: Pixels, block: bytes) -> bytes:
    height, width = pixels.shape[:2]
    return files.webp_with(files.encoded(pixels, "webp", lossless=True), width, height, (b"EXIF", block))


def _webp_with_marked_exif(pixels: Pixels, block: bytes) -> bytes:
    return _webp_with_exif(pixels, b"Exif\0\0" + block)


def _png_with_marked_exif(pixels: Pixels, block: bytes) -> bytes:
    return _png_with_exif(pixels, b"Exif\0\0" + block)


CARRIERS = [_png_with_exif, _png_with_marked_exif, _jpeg_with_exif, _webp_with_exif, _webp_with_marked_exif]


@pytest.mark.parametrize("orientation", SIDES)
@pytest.mark.parametrize("carrier", CARRIERS)
def test_orientation(carrier: Carrier, orientation: int) -> None:
    scene = files.smooth(24, 40)
    for order, kind in itertools.product("<>", (3, 4)):
        block = files.exif(orientation, order, kind)
        seen = read_picture(carrier(_stored(scene, orientation), block))
        assert seen.shape == scene.shape
        assert psnr_db(seen, scene) > 38


@pytest.mark.parametrize(
    "block",
    [
        files.exif(0),
        files.exif(9),
        files.exif(6)[:-9],  # ends within the directory
        files.exif(6).replace(b"\0\0\0\x08", b"\xff\xff\xff\xff"),  # a directory nowhere
        files.exif(6).replace(b"\x01\x12\0\x03", b"\x01\x12\0\x02"),  # of a kind that orientations are not
        b"MM",
        b"",
        b"JUNK" * 5,
    ],
    ids=repr,
)
@pytest.mark.parametrize("carrier", CARRIERS)
def test_exif_that_says_nothing_leaves_a_picture_as_it_is(carrier: Carrier, block: bytes) -> None:
    scene = files.smooth(16, 24)
    assert psnr_db(read_picture(carrier(scene, block)), scene) > 38


def test_the_first_of_two_exif_blocks_counts() -> None:
    scene = files.smooth(24, 40)
    first, second = ((0xE1, b"Exif\0\0" + files.exif(orientation)) for orientation in (8, 3))
    data = files.jpeg_with(files.encoded(_stored(scene, 8), "jpeg", quality=97), first, second)
    assert psnr_db(read_picture(data), scene) > 38


def _png_with_profile(pixels: Pixels, profile: bytes) -> bytes:
    kind = files.GREY if pixels.ndim == 2 else files.RGB
    return files.png(np.atleast_3d(pixels), 8, kind, (b"iCCP", b"any\0\0" + zlib.compress(profile)))


def _jpeg_with_profile(pixels: Pixels, profile: bytes) -> bytes:
    """In two segments, the second first."""
    halves = profile[:200], profile[200:]
    data = files.encoded(pixels, "jpeg", quality=98, subsampling=0)
    parts = [(0xE2, b"ICC_PROFILE\0" + bytes([number, 2]) + half) for number, half in enumerate(halves, 1)]
    return files.jpeg_with(data, *reversed(parts))


def _webp_with_profile(pixels: Pixels, profile: bytes) -> bytes:
    height, width = pixels.shape[:2]
    return files.webp_with(files.encoded(pixels, "webp", lossless=True), width, height, (b"ICCP", profile))


PROFILE_CARRIERS = [_png_with_profile, _jpeg_with_profile, _webp_with_profile]


@pytest.mark.parametrize("carrier", PROFILE_CARRIERS)
def test_colours_come_from_the_profile(carrier: Carrier) -> None:
    """One whose green is sRGB's red, its blue sRGB's green, its red sRGB's blue; and one in which levels are light itself."""
    pixels = files.smooth(24, 32)
    turned = files.matrix_profile([files.COLORANTS[place] for place in (2, 0, 1)])
    assert psnr_db(read_picture(carrier(pixels, turned)), pixels[..., [1, 2, 0]]) > 34
    light = np.vectorize(files.srgb_level)(pixels / 255)
    assert psnr_db(read_picture(carrier(pixels, files.matrix_profile(gamma=1.0))), light) > 38


def test_grey_and_palettes_have_profiles_too() -> None:
    grey = files.smooth(24, 32)[..., 0]
    light = np.vectorize(files.srgb_level)(grey / 255)
    assert psnr_db(read_picture(_png_with_profile(grey, files.grey_profile(1.0))), files.three(light)) > 45
    profile = (b"iCCP", b"any\0\0" + zlib.compress(files.matrix_profile(gamma=1.0)))
    data = files.png(INDICES[..., None], 8, files.PALETTE, profile, (b"PLTE", COLOURS.tobytes()))
    assert psnr_db(read_picture(data), np.vectorize(files.srgb_level)(COLOURS / 255)[INDICES]) > 40


def test_inks_have_profiles_too() -> None:
    """Paper is of lightness 255, two of the single inks of their own, and all else black."""
    lightness = np.zeros((2, 2, 2, 2))
    lightness[0, 0, 0, 0], lightness[1, 0, 0, 0], lightness[0, 0, 0, 1] = 255, 128, 77
    stream = io.BytesIO()
    inks = np.zeros((16, 48, 4), np.uint8)
    inks[:, 16:32, 0] = inks[:, 32:, 3] = 255
    profile = files.cmyk_profile(lightness)
    Image.frombytes("CMYK", (48, 16), inks.tobytes()).save(stream, "jpeg", quality=100, icc_profile=profile)
    seen = read_picture(stream.getvalue())
    for place, level in ((8, 255), (24, 128), (40, 77)):
        # CIE 15: lightness over 8 is the cube root of the light, on a scale from 16 below zero to 100.
        light = ((level / 255 * 100 + 16) / 116) ** 3
        assert np.abs(seen[8, place].astype(float) - files.srgb_level(light)).max() < 3


@pytest.mark.parametrize(
    "profile",
    [
        b"",
        b"no profile",
        files.grey_profile(1.0),
        files.matrix_profile()[:150],
    ],
    ids=["empty", "none", "of another space", "cut"],
)
@pytest.mark.parametrize("carrier", [_png_with_profile, _webp_with_profile])
def test_a_profile_that_cannot_be_used_is_ignored(carrier: Carrier, profile: bytes) -> None:
    pixels = files.smooth(16, 24)
    np.testing.assert_array_equal(read_picture(carrier(pixels, profile)), pixels)


def test_a_profile_larger_than_any_is_ignored() -> None:
    pixels = files.smooth(16, 24)
    large = files.matrix_profile([files.COLORANTS[place] for place in (2, 0, 1)]) + bytes(5 << 20)
    np.testing.assert_array_equal(read_picture(_webp_with_profile(pixels, large)), pixels)
