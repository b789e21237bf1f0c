"""What the formats' readers share: how large a picture may be, and a file stripped to what its pixels need."""

from __future__ import annotations

from dataclasses import dataclass

from diffuserve.errors import InvalidRequest


@dataclass(frozen=True)
class PictureLimits:
    """How large a picture may be; all is known from its header, before a pixel is decoded.

    Attributes:
        max_bytes: of the file.
        max_pixels: width times height. Reading takes up to some 16 bytes a pixel.
        max_side_px: of width and height each; JPEG's own limit unless told otherwise.
    """

    max_bytes: int = 100 * 2**20
    max_pixels: int = 100_000_000
    max_side_px: int = 65_535

    def check_bytes(self, count: int) -> None:
        if count > self.max_bytes:
            raise InvalidRequest(
                f"The file has more than the {self.max_bytes} bytes that are read. Make the picture smaller."
            )

    def check_size(self, width: int, height: int) -> None:
        if width < 1 or height < 1:
            raise InvalidRequest(f"The picture is {width} x {height} px; it must have pixels.")
        if width * height > self.max_pixels or max(width, height) > self.max_side_px:
            raise InvalidRequest(
                f"The picture is {width} x {height} px; at most {self.max_pixels} pixels, and {self.max_side_px} a side, "
                "are read. Make it smaller."
            )


DEFAULT_LIMITS = PictureLimits()
MAX_PROFILE_BYTES = 4 * 2**20  # of a colour profile; the largest, those for printing, have 3 MB


@dataclass(frozen=True)
class Stripped:
    """One picture of a file, within the limits.

    Attributes:
        file: of the same format, holding that picture alone and nothing that its pixels do not need.
        size: width and height, before the orientation is applied.
        exif: TIFF structure with the orientation; empty if there is none.
        icc_profile: empty if there is none.
        transparent: the value, as decoded, of the pixels that are transparent: one level, or one for each of R, G, B.
        covered: left, top, right and bottom of what the file has pixels for; all else is transparent. None for all.
    """

    file: bytes
    size: tuple[int, int]
    exif: bytes = b""
    icc_profile: bytes = b""
    transparent: tuple[int, ...] | None = None
    covered: tuple[int, int, int, int] | None = None


def ends_early(format: str) -> InvalidRequest:
    return InvalidRequest(f"The {format} file ends before its picture does. Copy or save it again, whole.")


def damaged(format: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"The {format} file is damaged: {what}. Save it again.")


def unsupported(what: str) -> InvalidRequest:
    return InvalidRequest(f"{what} is not read. Save the picture as a plain PNG.")
