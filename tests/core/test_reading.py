"""Foreign pictures as they are to be seen. The files are made byte by byte where that is possible, and what is expected is
computed here from the pixels that went into them."""

from __future__ import annotations

import io
import threading
import warnings
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from diffuserve.images.reading import read_picture
from diffuserve.trials.similarity import psnr_db
from tests.core import picture_files as files

Pixels = NDArray[np.uint8]
DRAW = np.random.default_rng(7)
BLACK, TEAL = (0, 0, 0), (10, 130, 140)
NOISE: Pixels = DRAW.integers(0, 256, (19, 13, 3), dtype=np.uint8)
OPACITY: Pixels = DRAW.integers(0, 256, (19, 13), dtype=np.uint8)
COLOURS: Pixels = DRAW.integers(0, 256, (256, 3), dtype=np.uint8)
INDICES: Pixels = DRAW.integers(0, 256, (19, 13), dtype=np.uint8)


def _equal(data: bytes, pixels: NDArray[Any], background: tuple[int, int, int] = BLACK, within: float = 0) -> None:
    seen = read_picture(data, background=background)
    assert (seen.dtype, seen.shape) == (np.uint8, pixels.shape)
    assert seen.flags.writeable and seen.flags.c_contiguous
    np.testing.assert_allclose(seen.astype(float), pixels.astype(float), atol=within, rtol=0)


@pytest.mark.parametrize("interlaced", [False, True], ids=["plain", "interlaced"])
@pytest.mark.parametrize(
    ("colour", "bits"),
    [(files.GREY, bits) for bits in (1, 2, 4, 8, 16)]
    + [(files.PALETTE, bits) for bits in (1, 2, 4, 8)]
    + [(kind, bits) for kind in (files.RGB, files.GREY_ALPHA, files.RGBA) for bits in (8, 16)],
)
def test_png(colour: int, bits: int, interlaced: bool) -> None:
    channels = {files.GREY: 1, files.PALETTE: 1, files.RGB: 3, files.GREY_ALPHA: 2, files.RGBA: 4}[colour]
    samples = DRAW.integers(0, 2**bits, (11, 9, channels))
    extra = [(b"PLTE", COLOURS[: 2**bits].tobytes())] if colour == files.PALETTE else []
    data = files.png(samples, bits, colour, *extra, interlaced=interlaced, parts=3)
    levels = samples * 255 / (2**bits - 1)
    if colour == files.PALETTE:
        _equal(data, COLOURS[samples[..., 0]])
    elif colour in (files.GREY, files.RGB):
        _equal(data, levels if colour == files.RGB else files.three(levels[..., 0]), within=1 if bits == 16 else 0)
    else:
        seen = levels[..., :3] if colour == files.RGBA else files.three(levels[..., 0])
        expected = files.laid_on(seen, levels[..., -1], TEAL)
        _equal(data, expected, TEAL, within=0.51 if bits == 8 else 2)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_grey_that_png_makes_transparent(bits: int) -> None:
    samples = DRAW.integers(0, 2**bits, (9, 7, 1))
    key = int(samples[4, 3, 0])
    samples[5, 6, 0] = key ^ 1  # which differs in the last bit only
    data = files.png(samples, bits, files.GREY, (b"tRNS", key.to_bytes(2, "big")))
    levels = files.three(samples[..., 0] * 255 / (2**bits - 1))
    _equal(data, np.where(samples == key, TEAL, levels), TEAL, within=1 if bits == 16 else 0)


def test_a_colour_that_png_makes_transparent() -> None:
    pixels = NOISE.copy()
    pixels[3, 4] = pixels[7, 8] = 20, 130, 40
    pixels[5, 5] = 20, 130, 41
    data = files.png(pixels, 8, files.RGB, (b"tRNS", bytes([0, 20, 0, 130, 0, 40])))
    expected = pixels.copy()
    expected[3, 4] = expected[7, 8] = TEAL
    _equal(data, expected, TEAL)


@pytest.mark.parametrize("opacities", [[0, 255, 128, 7], [255, 255, 0], [0] * 256], ids=len)
def test_a_palette_with_opacities(opacities: list[int]) -> None:
    """Entries beyond those given are opaque."""
    palette, table = (b"PLTE", COLOURS.tobytes()), (b"tRNS", bytes(opacities))
    data = files.png(INDICES[..., None] % 6, 8, files.PALETTE, palette, table)
    alpha = np.array([*opacities, *[255] * 256])[INDICES % 6]
    _equal(data, files.laid_on(COLOURS[INDICES % 6], alpha, TEAL), TEAL, within=0.51)


def test_a_background_is_white_unless_told_otherwise() -> None:
    hidden = np.zeros((3, 2, 4), np.uint8) + np.array([0, 255, 0, 0], np.uint8)  # what editors leave under it
    assert (read_picture(files.png(hidden, 8, files.RGBA)) == 255).all()


@pytest.mark.parametrize("lossless", [True, False])
def test_webp(lossless: bool) -> None:
    pixels = files.smooth(48, 40)
    seen = read_picture(files.encoded(pixels, "webp", lossless=lossless, quality=95))
    assert seen.shape == pixels.shape
    assert psnr_db(seen, pixels) > (1000 if lossless else 38)


@pytest.mark.parametrize("lossless", [True, False])
def test_transparent_webp(lossless: bool) -> None:
    """`exact` keeps the colours under what is transparent."""
    pixels = np.dstack([files.smooth(48, 40), np.tile(np.arange(40, dtype=np.uint8) * 6, (48, 1))])
    data = files.encoded(pixels, "webp", lossless=lossless, quality=95, exact=True)
    assert psnr_db(read_picture(data, background=TEAL), files.laid_on(pixels[..., :3], pixels[..., 3], TEAL)) > 38


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"keep_rgb": True}], ids=str)
def test_jpeg(options: dict[str, bool]) -> None:
    pixels = files.smooth(40, 56)
    assert psnr_db(read_picture(files.encoded(pixels, "jpeg", quality=95, **options)), pixels) > 38
    grey = pixels[..., 0]
    assert psnr_db(read_picture(files.encoded(grey, "jpeg", quality=95)), files.three(grey)) > 38


def test_a_jpeg_whose_components_are_rgb_by_adobes_word_alone() -> None:
    """Photoshop's have the numbers of Y, Cb and Cr."""
    pixels = files.smooth(40, 56)
    data = files.encoded(pixels, "jpeg", quality=95, keep_rgb=True)
    assert data[6:11] == b"Adobe"
    for named in (b"R\x11\0G\x11\0B\x11\0", b"R\0G\0B\0"):  # of the frame and of the scan
        assert named in data
        data = data.replace(named, named.replace(b"R", b"\1").replace(b"G", b"\2").replace(b"B", b"\3"))
    assert psnr_db(read_picture(data), pixels) > 38


def test_cmyk_jpeg() -> None:
    """Stored inverted; light is what the inks leave of it."""
    inks = np.dstack([files.smooth(32, 32), files.smooth(32, 32)[..., :1] // 2])
    stream = io.BytesIO()
    Image.frombytes("CMYK", (32, 32), inks.tobytes()).save(stream, "jpeg", quality=97)
    data = stream.getvalue()
    assert b"\xff\xee\0\x0eAdobe" in data
    expected = (255.0 - inks[..., :3]) * (255 - inks[..., 3:]) / 255
    assert psnr_db(read_picture(data), expected) > 36


def test_bmp() -> None:
    bgr = NOISE[..., ::-1].reshape(19, -1)
    _equal(files.bmp(bgr, 24), NOISE)
    _equal(files.bmp(bgr, 24, top_down=True), NOISE)
    quads = np.dstack([NOISE[..., ::-1], OPACITY]).reshape(19, -1)
    _equal(files.bmp(quads, 32), NOISE)  # the fourth byte means nothing here
    masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    _equal(files.bmp(quads, 32, masks=masks), files.laid_on(NOISE, OPACITY, TEAL), TEAL, within=0.51)
    table = np.dstack([COLOURS[:, ::-1][None], np.zeros((1, 256, 1), np.uint8)]).tobytes()
    _equal(files.bmp(INDICES, 8, palette=table), COLOURS[INDICES])
    bits = INDICES[:, :2]
    _equal(files.bmp(bits, 1, palette=table[:8]), COLOURS[np.unpackbits(bits, axis=1)])


@pytest.mark.parametrize("options", [{}, {"local": True}, {"interlaced": True}, {"disposal": 2}], ids=str)
def test_gif(options: dict[str, Any]) -> None:
    _equal(files.gif(INDICES, COLOURS, **options), COLOURS[INDICES])
    seen = np.where(np.equal(INDICES, INDICES[2, 3])[..., None], TEAL, COLOURS[INDICES])
    _equal(files.gif(INDICES, COLOURS, transparent=int(INDICES[2, 3]), **options), seen, TEAL)


@pytest.mark.parametrize("screen", [(30, 25), (2, 2), (0, 0)], ids=str)
def test_a_gif_whose_frame_is_not_its_screen(screen: tuple[int, int]) -> None:
    """Nothing was drawn beside the frame, so it is transparent there."""
    expected = np.zeros((max(screen[1], 22), max(screen[0], 17), 3)) + TEAL
    expected[3:22, 4:17] = np.where((INDICES == 77)[..., None], TEAL, COLOURS[INDICES])
    _equal(files.gif(INDICES, COLOURS, at=(4, 3), screen=screen, transparent=77), expected, TEAL)


@pytest.mark.parametrize("format", ["png", "webp", "gif"])
def test_an_animation_is_its_first_frame(format: str) -> None:
    frames = [Image.fromarray(COLOURS[INDICES % number]) for number in (3, 5, 7)]
    stream = io.BytesIO()
    frames[0].save(stream, format, save_all=True, append_images=frames[1:], lossless=True)
    with Image.open(io.BytesIO(stream.getvalue())) as image:
        assert getattr(image, "n_frames", 1) == 3
    _equal(stream.getvalue(), np.asarray(frames[0]))


def test_what_else_is_in_a_file_does_not_matter() -> None:
    """Second views, gain maps and films (in which any bytes may stand) behind a JPEG; thumbnails in it; texts in a PNG."""
    pixels, other = files.smooth(24, 40), files.encoded(255 - files.smooth(24, 40), "jpeg")
    jpeg = files.encoded(pixels, "jpeg", quality=95)
    thumbnail = (0xE1, b"Exif\0\0" + files.exif(1) + other)
    multi = (0xE2, b"MPF\0" + b"MM\0*" + b"\xff" * 30)
    expected = read_picture(jpeg)
    for data in (
        files.jpeg_with(jpeg, thumbnail, multi, (0xFE, b"\xff\xd9")) + other,
        jpeg + b"\0\0" + b"\xff\xda\0\2" * 999,
    ):
        np.testing.assert_array_equal(read_picture(data), expected)
    others = ((b"tEXt", b"k\0v"), (b"zTXt", b"k\0\0junk"), (b"gAMA", bytes(4)), (b"aaAa", b"abc"))
    _equal(files.png(pixels, 8, files.RGB, *others) + b"junk", pixels)


def _with_filters(action: str, data: bytes) -> tuple[Pixels, list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)  # type: ignore[arg-type]
        return read_picture(data), caught


def test_the_settings_of_the_process_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that another user of Pillow may have set, of fewer pixels than these 3,000, and the filters of warnings: Pillow
    would warn of the size, and of EXIF that ends early."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    pixels, broken = files.smooth(50, 60), files.exif(1)[:-9]
    indices = pixels[..., 0]
    webp = files.webp_with(files.encoded(pixels, "webp", lossless=True), 60, 50, (b"EXIF", broken))
    for action in ("error", "always"):
        for data, expected in (
            (files.png(pixels, 8, files.RGB, (b"eXIf", broken)), pixels),
            (files.jpeg_with(files.encoded(pixels, "jpeg", quality=95), (0xE1, b"Exif\0\0" + broken)), pixels),
            (webp, pixels),
            (files.gif(indices, COLOURS), COLOURS[indices]),
            (files.bmp(pixels[..., ::-1].reshape(50, -1), 24), pixels),
        ):
            seen, caught = _with_filters(action, data)
            assert not caught
            assert psnr_db(seen, expected) > 38


def test_threads_read_at_once() -> None:
    sources = [
        (files.png(NOISE, 8, files.RGB), NOISE),
        (files.gif(INDICES, COLOURS), COLOURS[INDICES]),
        (files.encoded(NOISE, "jpeg", quality=90), None),
    ]
    expected = [read_picture(data) if pixels is None else pixels for data, pixels in sources]
    filters = list(warnings.filters)
    wrong: list[int] = []

    def read() -> None:
        for _ in range(20):
            for place, (data, _pixels) in enumerate(sources):
                if not np.array_equal(read_picture(data), expected[place]):
                    wrong.append(place)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert list(warnings.filters) == filters
