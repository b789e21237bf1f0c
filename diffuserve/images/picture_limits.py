"""How large a foreign picture may be."""

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
        if width * height > self.max_pixels or max(width, height) > self.max_side_px:
            raise InvalidRequest(
                f"The picture is {width} x {height} px; at most {self.max_pixels} pixels, and {self.max_side_px} a side, "
                "are read. Make it smaller."
            )


DEFAULT_LIMITS = PictureLimits()
