"""Pictures that are too large, incomplete, damaged or hostile: one plain error, before memory is spent, whatever the bytes."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffuserve.errors import InvalidRequest
from diffuserve.images.picture_limits import PictureLimits
from diffuserve.images.reading import read_picture, read_picture_file
from tests.core import picture_files as files

SMALL = PictureLimits(max_bytes=20_000, max_pixels=600, max_side_px=60)
DRAW = np.random.default_rng(3)
PIXELS = DRAW.integers(0, 256, (20, 30, 3), dtype=np.uint8)
INDICES, COLOURS = DRAW.integers(0, 256, (20, 30), dtype=np.uint8), DRAW.integers(0, 256, (256, 3), dtype=np.uint8)
SECRET = b"a very private remark"


def _samples() -> dict[str, bytes]:
    """Valid files of 30 x 20 px, with what else such files hold."""
    profile, block = files.matrix_profile(), files.exif(6)
    png_extra = (b"iCCP", b"any\0\0" + zlib.compress(profile)), (b"tEXt", b"Comment\0" + SECRET)
    alpha = np.dstack([PIXELS, INDICES])
    jpeg = {"exif": b"Exif\0\0" + block, "comment": SECRET, "icc_profile": profile}
    frames = [Image.fromarray(COLOURS[INDICES % number]) for number in (3, 5)]
    animation = io.BytesIO()
    frames[0].save(animation, "webp", save_all=True, append_images=frames[1:], lossless=True)
    cmyk = io.BytesIO()
    Image.frombytes("CMYK", (30, 20), np.dstack([PIXELS, INDICES]).tobytes()).save(cmyk, "jpeg")
    quads = np.dstack([PIXELS, INDICES]).reshape(20, -1)
    palette = COLOURS.tobytes()
    return {
        "png": files.png(PIXELS, 8, files.RGB, *png_extra, (b"eXIf", block), (b"tRNS", bytes(6)), parts=2),
        "png-interlaced": files.png(alpha, 8, files.RGBA, interlaced=True),
        "png-palette": files.png(
            INDICES[..., None] % 16, 4, files.PALETTE, (b"PLTE", palette[:48]), (b"tRNS", b"\0\x80")
        ),
        "png-16": files.png(INDICES[..., None] * 257, 16, files.GREY, (b"tRNS", b"\0\x80")),
        "jpeg": files.encoded(PIXELS, "jpeg", **jpeg),
        "jpeg-progressive": files.encoded(PIXELS, "jpeg", progressive=True, **jpeg),
        "jpeg-grey": files.encoded(INDICES, "jpeg"),
        "jpeg-cmyk": cmyk.getvalue(),
        "webp": files.encoded(alpha, "webp", quality=80, exif=b"Exif\0\0" + block, icc_profile=profile, xmp=SECRET),
        "webp-lossless": files.encoded(alpha, "webp", lossless=True),
        "webp-animation": animation.getvalue(),
        "gif": files.gif(INDICES[:15, :20], COLOURS, at=(2, 1), screen=(30, 20), transparent=3),
        "gif-interlaced": files.gif(INDICES, COLOURS, local=True, interlaced=True),
        "bmp": files.bmp(PIXELS.reshape(20, -1), 24),
        "bmp-masks": files.bmp(quads, 32, masks=(0xFF0000, 0xFF00, 0xFF, 0xFF000000), top_down=True),
        "bmp-palette": files.bmp(INDICES, 8, palette=COLOURS.repeat(2, axis=1)[:, :4].tobytes()),
    }


SAMPLES = _samples()
LIMITS = PictureLimits(max_bytes=10**6, max_pixels=2000, max_side_px=60)


def _outcome(data: bytes, limits: PictureLimits = LIMITS) -> np.ndarray[Any, Any] | None:
    """The picture, or None if it is refused as it should be."""
    try:
        pixels = read_picture(data, limits=limits)
    except InvalidRequest as error:
        message = str(error)
        assert message.isascii() and message[0].isupper() and message[-1] == "."
        assert SECRET.decode() not in message
        return None
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    height, width = pixels.shape[:2]
    assert 0 < height * width <= limits.max_pixels and max(height, width) <= limits.max_side_px
    return pixels


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"^The file is empty\.$"),
        (b" " + SAMPLES["gif"], "none of PNG"),
        (b"GIF7", r"none of PNG, JPEG, WebP, GIF, BMP\. Save the picture as PNG\.$"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "none of PNG"),
        (b"II*\0" + bytes(100), "none of PNG"),
        (b"\0\0\0\x18ftypheic" + bytes(100), "none of PNG"),
        (b"RIFF\x20\0\0\0WAVEfmt " + bytes(100), "none of PNG"),
        (files.png(np.zeros((2, 2, 3), int), 16, files.RGB, (b"tRNS", bytes(6))), r"16-bit RGB .* plain PNG\.$"),
        (
            b"\xff\xd8\xff\xc1\0\x0b\x0c\0\x05\0\x05\x01\x01\x11\0",  # 12 bits a sample
            r"^The JPEG file is damaged, incomplete or of a rare kind, and cannot be decoded\. Save it again\.$",
        ),
        (b"\xff\xd8\xff\xc0\0\x0b\x08\0\0\0\x05\x01\x01\x11\0", "cannot be decoded"),  # 5 x 0 px
        (SAMPLES["bmp"][:30] + b"\1" + SAMPLES["bmp"][31:], "compressed BMP is not read"),
    ],
)
def test_what_is_not_read(data: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read_picture(data)


def test_the_samples_are_read() -> None:
    for name, data in SAMPLES.items():
        pixels = _outcome(data)
        assert pixels is not None and sorted(pixels.shape) == [3, 20, 30], name
        assert np.ptp(pixels) > 100


def _webp_of_size(width: int, height: int) -> bytes:
    """Lossy, by its header."""
    data = bytearray(files.encoded(PIXELS, "webp"))
    start = data.index(b"\x9d\1\x2a") + 3
    data[start : start + 4] = struct.pack("<HH", width, height)
    return bytes(data)


def _webp_canvas(width: int, height: int) -> bytes:
    """An animation of two frames of 30 x 20 on a larger canvas, the first cut."""
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    data = bytearray(SAMPLES["webp-animation"])
    data[24:30] = size
    start = data.index(b"VP8L") + 8
    data[start + 5 : start + 40] = bytes(35)
    return bytes(data)


# Files whose headers claim a size and that have no such pixels: what was decoded before the size was checked would fail first.
CLAIMS: dict[str, Callable[[int, int], bytes]] = {
    "png": lambda width, height: files.png_header(width, height, 1, files.GREY) + files.png_chunk(b"IDAT", b""),
    "jpeg": lambda width, height: b"\xff\xd8\xff\xc2\0\x0b\x08" + struct.pack(">HH", height, width) + b"\1\1\x11\0\xff\xda\0\2",
    "webp": _webp_of_size,
    "webp-canvas": _webp_canvas,
    "gif": lambda width, height: b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + b"," + struct.pack("<4HBB", 0, 0, 1, 1, 0, 8),
    "gif-frame": lambda width, height: b"GIF87a" + bytes(7) + b"," + struct.pack("<4HBB", 0, 0, width, height, 0, 8),
    "bmp": lambda width, height: files.bmp(np.zeros((1, 4), np.uint8), 32)[:18] + struct.pack("<iiHHI20x", width, -height, 1, 32, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CLAIMS)
def test_size_is_checked_before_anything_is_decoded(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^The picture is 9000 x 9000 px; at most 600 pixels, .* smaller\.$"):
        read_picture(CLAIMS[name](9000, 9000), limits=SMALL)
    with pytest.raises(InvalidRequest, match=r"^The picture is 61 x 40 px; at most 9999 pixels, and 60 a side"):
        read_picture(CLAIMS[name](61, 40), limits=PictureLimits(max_pixels=9999, max_side_px=60))
    with pytest.raises(InvalidRequest, match="cannot be decoded"):
        read_picture(CLAIMS[name](900, 900))


def test_a_hundred_megapixels_are_read_unless_told_otherwise() -> None:
    with pytest.raises(InvalidRequest, match="12000 x 10000 px; at most 100000000 pixels, and 65535 a side"):
        read_picture(CLAIMS["png"](12000, 10000))


def test_bytes_are_counted_before_anything_else() -> None:
    with pytest.raises(InvalidRequest, match=r"more than the 20000 bytes that are read\. Make the picture smaller\.$"):
        read_picture(b"any" * 7000, limits=SMALL)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_beginning_of_a_file(name: str) -> None:
    """Refused at every length, or whole: never half a picture."""
    data = SAMPLES[name]
    whole = read_picture(data)
    for length in [*range(64), *range(64, len(data) - 20, 7), *range(len(data) - 20, len(data))]:
        pixels = _outcome(data[:length])
        assert pixels is None or np.array_equal(pixels, whole)
        if length < len(data) - 13:  # what follows a first frame, or pads it, may be missing
            assert pixels is None


def test_pixels_that_are_missing_in_a_whole_file() -> None:
    codes = (256 | 257 << 9).to_bytes(3, "little")
    gif = SAMPLES["gif"]
    start = gif.index(b"\x08\xff", 781 + 8)
    bmp = SAMPLES["bmp"][:-90]
    for data in (gif[:start] + b"\x08\x03" + codes + b"\0;", bmp):
        with pytest.raises(InvalidRequest, match="cannot be decoded"):
            read_picture(data)


def test_damage_that_only_a_checksum_shows() -> None:
    """A bit of a PNG's pixel stored as it is."""
    pixels = files.png_chunk(b"IDAT", zlib.compress((b"\0" + bytes(30)) * 20, 0))
    header, end = files.png_header(30, 20, 8, files.GREY), files.png_chunk(b"IEND", b"")
    assert _outcome(header + pixels + end) is not None
    flipped = pixels[:50] + bytes([pixels[50] ^ 8]) + pixels[51:]
    with pytest.raises(InvalidRequest, match="PNG file is damaged, incomplete"):
        read_picture(header + flipped + end)


def _peak_bytes(read: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _deflated(megabytes: int) -> bytes:
    """Zeros, a thousandth of their size, made piece by piece."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(megabytes)) + packer.flush()


def test_what_would_grow_does_not() -> None:
    """Texts and profiles of 200 MB in a file of 200 kB are refused, superfluous rows left where they are."""
    bomb = _deflated(200)
    samples = PIXELS[..., :1]
    plain = files.png(samples, 8, files.GREY)
    small = _peak_bytes(lambda: read_picture(plain))
    for chunk in ((b"zTXt", b"k\0\0" + bomb), (b"iTXt", b"k\0\1\0\0\0" + bomb), (b"iCCP", b"k\0\0" + bomb)):
        data = files.png(samples, 8, files.GREY, chunk)
        assert _outcome(data) is None
        assert _peak_bytes(partial(_outcome, data)) < small + 4 * 2**20
    rows = files.png_chunk(b"IDAT", bomb) + files.png_chunk(b"IEND", b"")
    data = files.png_header(30, 20, 8, files.GREY) + rows
    assert (read_picture(data) == 0).all()
    assert _peak_bytes(lambda: read_picture(data)) < small + 2**21


def test_a_jpeg_of_many_scans() -> None:
    data = files.encoded(PIXELS, "jpeg", progressive=True)
    last = data.rindex(b"\xff\xda")
    assert read_picture(data).shape == PIXELS.shape
    with pytest.raises(InvalidRequest, match="more than 100 scans"):
        read_picture(data[:last] + data[last:-2] * 101 + b"\xff\xd9")
    for hiding in (b"\xff\xfe\0\4\xff\xd9", b"\xff\1"):  # a comment that looks like the end; a marker without a segment
        with pytest.raises(InvalidRequest, match="more than 100 scans"):
            read_picture(data[:last] + (hiding + data[last:-2]) * 101 + b"\xff\xd9")


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "private name.png"
    path.write_bytes(SAMPLES["png-16"])
    expected = read_picture(SAMPLES["png-16"], background=(1, 2, 3))
    np.testing.assert_array_equal(read_picture_file(path, background=(1, 2, 3)), expected)
    with path.open("ab") as file:
        file.truncate(10**9)  # sparse
    for place, reason in (
        (path, "more than the 20000 bytes"),
        (tmp_path / "private.png", "cannot be opened: No such file or directory"),
        (tmp_path, "cannot be opened: Is a directory"),
    ):
        with pytest.raises(InvalidRequest, match=reason) as caught:
            read_picture_file(place, limits=SMALL)
        assert "private" not in str(caught.value) and str(tmp_path) not in str(caught.value)

    def refused() -> None:
        with pytest.raises(InvalidRequest):
            read_picture_file(path, limits=SMALL)

    assert _peak_bytes(refused) < 2**20


def _mutated(data: bytes, choose: random.Random) -> bytes:
    """Some bits flipped, a number set to an extreme, a piece cut out, doubled or moved."""
    result = bytearray(data)
    for _ in range(choose.choice((1, 1, 2, 5))):
        # Headers are a small part of a file and most of what can go wrong.
        at = choose.randrange(min(len(result), choose.choice((64, 400, len(data)))))
        length = choose.choice((1, 2, 4, 16, 200))
        piece = result[at : at + length]
        kind = choose.randrange(6)
        if kind == 0:
            result[at] ^= 1 << choose.randrange(8)
        elif kind == 1:
            result[at : at + 4] = choose.choice(
                (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f")
            )
        elif kind == 2:
            del result[at : at + length]
        elif kind == 3:
            result[at:at] = piece
        elif kind == 4:
            del result[at : at + length]
            to = choose.randrange(len(result) + 1)
            result[to:to] = piece
        else:
            del result[choose.randrange(at, len(result) + 1) :]
        if not result:
            return b""
    return bytes(result)


def _with_right_checksums(data: bytes) -> bytes:
    """A PNG in which damage is not found by the checksums, as far as its chunks can be followed."""
    result, at = bytearray(data), 8
    while at + 12 <= len(result):
        end = at + 8 + int.from_bytes(result[at : at + 4], "big")
        if end + 4 > len(result):
            break
        result[end : end + 4] = zlib.crc32(result[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(result)


@pytest.mark.parametrize("name", SAMPLES)
def test_mutations(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Some survive, most are refused, and nothing else ever happens."""
    choose = random.Random(name)  # noqa: S311 - no secret
    outcomes = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(400):
            data = _mutated(SAMPLES[name], choose)
            outcomes.append(_outcome(_with_right_checksums(data) if name.startswith("png") and number % 4 else data))
    assert not caught
    assert capfd.readouterr() == ("", "")
    refused = sum(pixels is None for pixels in outcomes)
    assert 0 < refused < len(outcomes)


def test_mutated_profiles_never_cost_the_picture() -> None:
    choose = random.Random(1)  # noqa: S311 - no secret
    profiles = [
        files.matrix_profile(),
        files.grey_profile(1.8),
        files.cmyk_profile(DRAW.integers(0, 256, (2, 2, 2, 2))),
    ]
    pictures = [(PIXELS, "RGB"), (INDICES, "L"), (np.dstack([PIXELS, INDICES]), "CMYK")]
    for profile, (pixels, mode) in zip(profiles, pictures, strict=True):
        for _ in range(200):
            stream = io.BytesIO()
            image = Image.frombytes(mode, (30, 20), pixels.tobytes())
            image.save(stream, "jpeg", icc_profile=_mutated(profile, choose))
            assert _outcome(stream.getvalue()) is not None
