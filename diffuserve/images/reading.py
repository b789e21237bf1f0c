"""The one door for pictures from outside: bytes of anybody's file to pixels, or a plain refusal.

PNG, JPEG, WebP, GIF and BMP are read, each by Pillow's class of that format alone, which the file's first bytes choose and never
its name. Its size is known, and checked, before a pixel is decoded. Pillow refuses a PNG with a compressed text or profile of
more than 1 MiB, or texts of more than 64 MiB together.

Not read: TIFF, which is many formats in one (a dozen codings, 32-bit floats of any range), which neither browsers nor the usual
training scripts read, and of whose tags Pillow warns through the whole process; AVIF and HEIC, many of which are HDR or
wide-gamut in ways that Pillow ignores, and which not every Pillow decodes; SVG, which is not a picture until it is drawn.
"""

from __future__ import annotations

import io
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from diffuserve.errors import InvalidRequest
from diffuserve.images.colours import srgb_from
from diffuserve.images.orientation import orientation_of, upright
from diffuserve.images.picture_limits import DEFAULT_LIMITS, PictureLimits

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

WHITE = (255, 255, 255)
# A progressive JPEG of few bytes may ask for thousands of scans of all pixels; real ones have some 10.
MAX_SCANS = 100

_FIRST_BYTES = {
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "WebP": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    "GIF": re.compile(rb"GIF8[79]a"),
    "BMP": re.compile(rb"BM"),
}
_SOS, _EOI = 0xDA, 0xD9
# A marker of JPEG that begins a segment or ends the picture: no stuffed zero, and none of those that stand alone (T.81, B.1.1.3).
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")


def read_picture(
    data: bytes, *, background: tuple[int, int, int] = WHITE, limits: PictureLimits = DEFAULT_LIMITS
) -> NDArray[np.uint8]:
    """A picture as it is to be seen, in sRGB.

    EXIF's orientation is applied. What is transparent is laid on one colour. An animation is its first frame, a PNG's the
    picture that it shows where animations are not. Of 16 bits a channel the upper 8 are taken. Colours are brought from an
    embedded ICC profile to sRGB (`diffuserve.images.colours`); CMYK in JPEG is inverted, as Adobe and all since write it. PNG's
    gAMA, cHRM and cICP are ignored.

    What cannot be told: a JPEG whose coded data is damaged or missing in the middle has wrong or grey pixels from there on, in
    every program, since nothing in the format checks them; a PNG whose compressed data is whole but of too few rows, which no
    program writes, is black below them.

    Pillow warns, through the filters of the process, of two things that no program writes: a GIF whose first frame is of more
    than Pillow's own limit of pixels (89 million), and a PNG with a wrong count of frames.

    Args:
        data: the file.
        background: RGB, 0 .. 255, under what is transparent.
        limits: beyond which it is refused before it is decoded.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        InvalidRequest: it is in none of the formats, too large, damaged or incomplete. The message says nothing of what is
            in the file but its size.
    """
    limits.check_bytes(len(data))
    if not data:
        raise InvalidRequest("The file is empty.")
    format = next((name for name, first in _FIRST_BYTES.items() if first.match(data)), None)
    if format is None:
        raise InvalidRequest(f"The file is none of {', '.join(_FIRST_BYTES)}. Save the picture as PNG.")
    try:
        source = _opened(format, data, limits)
        image, alpha = _decoded(source, grey_bits=data[24] if format == "PNG" else 8)
        image = _on_background(srgb_from(image, source.info.get("icc_profile")), alpha, background)
        return np.array(upright(np.asarray(image), orientation_of(source.info.get("exif", b""))), order="C")
    except InvalidRequest:
        raise
    except Exception:
        # Pillow raises whatever it comes upon, and its messages quote the file.
        raise InvalidRequest(
            f"The {format} file is damaged, incomplete or of a rare kind, and cannot be decoded. Save it again."
        ) from None


def read_picture_file(
    path: Path, *, background: tuple[int, int, int] = WHITE, limits: PictureLimits = DEFAULT_LIMITS
) -> NDArray[np.uint8]:
    """`read_picture` of a file on this machine; no more of it is read than the limits allow.

    Raises:
        InvalidRequest: also if there is no such file. The message does not name it.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limits.max_bytes + 1)
    except OSError as error:
        raise InvalidRequest(f"The file cannot be opened: {error.strerror}.") from None
    return read_picture(data, background=background, limits=limits)


@cache
def _classes() -> dict[str, type[ImageFile]]:
    """Pillow's class of each format, by itself: `Image.open` would warn at a limit that is the process's and not ours."""
    from PIL.BmpImagePlugin import BmpImageFile
    from PIL.GifImagePlugin import GifImageFile
    from PIL.Image import Exif
    from PIL.JpegImagePlugin import JpegImageFile
    from PIL.PngImagePlugin import PngImageFile
    from PIL.WebPImagePlugin import WebPImageFile

    class Jpeg(JpegImageFile):
        def getexif(self) -> Exif:
            """Empty: Pillow looks there for a resolution, and warns of all that it cannot read, which many cameras write."""
            return Exif()

    return {"PNG": PngImageFile, "JPEG": Jpeg, "WebP": WebPImageFile, "GIF": GifImageFile, "BMP": BmpImageFile}


def _opened(format: str, data: bytes, limits: PictureLimits) -> ImageFile:
    """The picture with its header read, within the limits, and no pixel decoded."""
    stream = io.BytesIO(data)
    image = _classes()[format](stream)
    limits.check_size(*image.size)
    if format == "PNG":
        # All checksums, and whether it has an end: decoding asks for neither. Afterwards that object is of no use.
        _classes()[format](io.BytesIO(data)).verify()
        if "transparency" in image.info and data[24:26] == b"\x10\x02":
            raise _unsupported("A PNG of 16-bit RGB with a transparent colour")  # Pillow decodes its upper bytes only
    elif format == "JPEG" and _scans(data, stream.tell()) > MAX_SCANS:
        raise _unsupported(f"A JPEG of more than {MAX_SCANS} scans")
    elif format == "BMP" and image.info["compression"] in (1, 2):
        raise _unsupported("A compressed BMP")  # which next to none is; Pillow decodes it pixel by pixel in Python
    return image


def _scans(data: bytes, at: int) -> int:
    """How many scans a JPEG has whose first one's coded data begins there; what follows the picture (a film, say) has its own."""
    scans = 1
    while (found := _MARKER.search(data, at)) and data[found.end() - 1] != _EOI:
        scans += data[found.end() - 1] == _SOS
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    return scans


def _decoded(source: ImageFile, grey_bits: int) -> tuple[Image, Image | None]:
    """The picture in mode L, RGB or CMYK, and its opacity in mode L if it is not opaque throughout."""
    from PIL import Image

    source.load()
    image: Image.Image = source
    alpha: Image.Image | None = None
    transparent = image.info.get("transparency")
    if image.mode == "P":
        image = image.convert("RGB" if transparent is None else "RGBA")
    elif transparent is not None:
        # Pillow's own conversion forgets that levels of 2 and 4 bits were scaled, and clips those of 16; and 1 bit's is 1 or 255.
        key = bool(transparent) if image.mode == "1" else np.multiply(transparent, {2: 85, 4: 17}.get(grey_bits, 1))
        same = np.asarray(image).reshape(image.height, image.width, -1) == key
        alpha = Image.fromarray(np.where(same.all(axis=2), np.uint8(0), np.uint8(255)))
    if image.mode == "1":
        image = image.convert("L")
    if image.mode.startswith("I"):  # 16 bits, of which some versions of Pillow make 32
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("LA", "RGBA"):
        alpha = image.getchannel("A")
        image = image.convert("L" if image.mode == "LA" else "RGB")
    return image, alpha


def _on_background(image: Image, alpha: Image | None, background: tuple[int, int, int]) -> Image:
    from PIL import Image

    if alpha is None:
        return image
    laid = Image.new("RGB", image.size, background)
    laid.paste(image, mask=alpha)
    return laid


def _unsupported(what: str) -> InvalidRequest:
    return InvalidRequest(f"{what} is not read. Save the picture as a plain PNG.")
