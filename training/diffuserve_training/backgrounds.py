"""The twelve colours on which things lie, and how captions call them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (20, 20, 24),
    "red": (225, 60, 60),
    "orange": (245, 150, 50),
    "yellow": (250, 215, 80),
    "green": (80, 180, 90),
    "blue": (70, 120, 220),
    "purple": (150, 90, 200),
    "pink": (245, 160, 190),
    "gray": (150, 150, 155),
    "brown": (140, 95, 60),
    "teal": (60, 175, 170),
}
NAMES = tuple(BACKGROUNDS)
COLOURS: NDArray[np.uint8] = np.array(list(BACKGROUNDS.values()), np.uint8)
"""(12, 3), in the order of `NAMES`."""


def nearest_background(colour: NDArray[np.floating]) -> str:
    """Name of the colour that is nearest to an (R, G, B) of 0 .. 255."""
    distance = np.square(COLOURS.astype(float) - colour).sum(axis=1)
    return NAMES[int(distance.argmin())]
