"""Which icon an image looks most like: the measure of whether a model draws what it was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffuserve_training.backgrounds import COLOURS, NAMES, lay_on, nearest_background
from diffuserve_training.icons import Icon

_SIDE = 64
_BORDER_PX = 4


@dataclass(frozen=True)
class Found:
    """What an image was found to show.

    Attributes:
        rank: of the icon that was asked for among those of its style, 0 the nearest.
        style: of the nearest icon among all styles.
        background: the name that is nearest to the median colour of the border.
    """

    rank: int
    style: str
    background: str


class Gallery:
    """All icons that an image is compared with.

    The distance is the mean squared difference of the pixels plus that of the edges, both at 64 x 64 and on the
    background that was asked for. Edges are the differences of neighbouring pixels, which here have about a tenth of the
    pixels' variance; so they count ten times, that outlines count as much as areas.
    """

    _EDGE_WEIGHT = 10.0

    def __init__(self, icons: Sequence[Icon], drawn: NDArray[np.uint8]) -> None:
        """`drawn`: (N, H, W, 4) uint8; H and W are multiples of 64."""
        self._icons = list(icons)
        self._drawn = drawn
        self._features: dict[str, NDArray[np.float32]] = {}

    def find(self, image: NDArray[np.uint8], name: str, style: str, background: str) -> Found:
        """`image`: (H, W, 3) uint8, asked for as `name` in `style` on `background`."""
        difference = self._on(background) - _features(image[None])
        distance = np.square(difference).mean(axis=1)
        of_style = np.array([icon.style == style for icon in self._icons])
        wanted = next(n for n, icon in enumerate(self._icons) if icon.name == name and icon.style == style)
        rank = int((distance[of_style] < distance[wanted]).sum())
        border = np.concatenate(
            [
                image[:_BORDER_PX].reshape(-1, 3),
                image[-_BORDER_PX:].reshape(-1, 3),
                image[:, :_BORDER_PX].reshape(-1, 3),
            ]
        )
        return Found(rank, self._icons[int(distance.argmin())].style, nearest_background(np.median(border, axis=0)))

    def _on(self, background: str) -> NDArray[np.float32]:
        if background not in self._features:
            colours = np.repeat(COLOURS[NAMES.index(background)][None], len(self._drawn), axis=0)
            self._features[background] = _features(lay_on(self._drawn, colours))
        return self._features[background]


def _features(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(N, H, W, 3) uint8 to (N, F) float32: pixels, then weighted edges; their means are taken together."""
    side = images.shape[1] // _SIDE
    small = images.reshape(len(images), _SIDE, side, _SIDE, side, 3).mean(axis=(2, 4), dtype=np.float32) / 255
    weight = np.float32(np.sqrt(Gallery._EDGE_WEIGHT))
    edges = [weight * np.diff(small, axis=axis).reshape(len(images), -1) for axis in (1, 2)]
    return np.concatenate([small.reshape(len(images), -1), *edges], axis=1)
