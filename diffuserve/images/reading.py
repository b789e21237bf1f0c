"""The one door for pictures from outside: bytes of anybody's file to pixels, or a plain refusal.

PNG, JPEG, WebP, GIF and BMP are read. A file is told by its first bytes, never by its name. Its containers are walked here
first, which yields its size before anything is decoded, what turns it upright, its colour profile, and a file of nothing but
one picture's pixels. Only that is given to Pillow, to the one class of that format. So what else a file holds (texts, thumbnails,
frames, second views, gain maps) can neither grow in memory nor make Pillow warn, whatever its settings are.

Not read: TIFF, which is many formats in one (a dozen codings, 32-bit floats of any range, tags without end), and which neither
browsers nor the usual training scripts read; AVIF and HEIC, many of which are HDR or wide-gamut in ways that Pillow ignores,
and which not every Pillow decodes; SVG, which is no picture until it is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from diffuserve.errors import InvalidRequest
from diffuserve.images import bmp, gif, jpeg, png, webp
from diffuserve.images.colours import srgb_from
from diffuserve.images.orientation import orientation_of, upright
from diffuserve.images.stripped import DEFAULT_LIMITS, PictureLimits, Stripped

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

WHITE = (255, 255, 255)

_STRIP: dict[str, Callable[[bytes, PictureLimits], Stripped]] = {
    "PNG": png.strip,
    "JPEG": jpeg.strip,
    "WebP": webp.strip,
    "GIF": gif.strip,
    "BMP": bmp.strip,
}


def read_picture(
    data: bytes, *, background: tuple[int, int, int] = WHITE, limits: PictureLimits = DEFAULT_LIMITS
) -> NDArray[np.uint8]:
    """A picture as it is to be seen, in sRGB.

    EXIF's orientation is applied. What is transparent is laid on one colour. An animation is its first frame, a PNG's the
    picture that it shows where animations are not. Of 16 bits a channel the upper 8 are taken. Colours are brought from an
    embedded ICC profile to sRGB (`diffuserve.images.colours`); CMYK in JPEG is inverted, as Adobe and all since write it. PNG's
    gAMA, cHRM and cICP are ignored.

    What cannot be told: a JPEG whose coded data is damaged or missing in the middle has wrong or grey pixels from there on, in
    every program, since nothing in the format checks them.

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
    format = _format_of(data)
    try:
        stripped = _STRIP[format](data, limits)
        image, alpha = _decoded(format, stripped)
        image = _on_background(srgb_from(image, stripped.icc_profile), alpha, background)
        return np.array(upright(np.asarray(image), orientation_of(stripped.exif)), order="C")
    except InvalidRequest:
        raise
    except Exception:
        # Pillow's decoders raise whatever they come upon, and their messages quote the file.
        raise InvalidRequest(f"The {format} file is damaged and cannot be decoded. Save it again.") from None


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


def _format_of(data: bytes) -> str:
    if not data:
        raise InvalidRequest("The file is empty.")
    for format, reader in (("PNG", png), ("JPEG", jpeg), ("GIF", gif), ("BMP", bmp)):
        if data.startswith(reader.SIGNATURE):
            return format
    if data.startswith(webp.SIGNATURE) and data[8:12] == webp.KIND:
        return "WebP"
    raise InvalidRequest(f"The file is none of {', '.join(_STRIP)}. Save the picture as PNG.")


def _decoded(format: str, stripped: Stripped) -> tuple[Image, Image | None]:
    """The picture in mode L, RGB or CMYK, and its opacity in mode L if it is not opaque throughout."""
    from PIL import Image

    source = _opened(format, stripped.file)
    if source.size != stripped.size:
        raise ValueError("the decoder sees another size than was checked")
    source.load()
    image: Image.Image = source
    alpha: Image.Image | None = None
    if image.mode == "1":
        image = image.convert("L")
    if stripped.transparent is not None:
        levels = np.asarray(image)
        levels = levels.reshape(*levels.shape[:2], -1)
        alpha = Image.fromarray(np.where((levels == stripped.transparent).all(axis=2), np.uint8(0), np.uint8(255)))
    if image.mode.startswith("I"):  # 16 bits, of which some versions of Pillow make 32
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "P":
        image = image.convert("RGB")
    if image.mode in ("LA", "RGBA"):
        alpha = image.getchannel("A")
        image = image.convert("L" if image.mode == "LA" else "RGB")
    if stripped.covered:
        alpha = _covered(image, alpha, stripped.covered)
    return image, alpha


def _opened(format: str, file: bytes) -> ImageFile:
    """Pillow's class of the format, by itself: `Image.open` would warn at a limit that is the process's and not ours."""
    from PIL.BmpImagePlugin import BmpImageFile
    from PIL.GifImagePlugin import GifImageFile
    from PIL.JpegImagePlugin import JpegImageFile
    from PIL.PngImagePlugin import PngImageFile
    from PIL.WebPImagePlugin import WebPImageFile

    classes: dict[str, type[ImageFile]] = {
        "PNG": PngImageFile,
        "JPEG": JpegImageFile,
        "WebP": WebPImageFile,
        "GIF": GifImageFile,
        "BMP": BmpImageFile,
    }
    return classes[format](io.BytesIO(file))


def _covered(image: Image, alpha: Image | None, box: tuple[int, int, int, int]) -> Image:
    from PIL import Image

    left, top, right, bottom = box
    opacity = np.zeros((image.height, image.width), np.uint8)
    opacity[top:bottom, left:right] = 255 if alpha is None else np.asarray(alpha)[top:bottom, left:right]
    return Image.fromarray(opacity)


def _on_background(image: Image, alpha: Image | None, background: tuple[int, int, int]) -> Image:
    from PIL import Image

    if alpha is None:
        return image
    laid = Image.new("RGB", image.size, background)
    laid.paste(image, mask=alpha)
    return laid
