"""What in a picture is background, and where the things on it are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_RING_PX = 3
_ANGLES = (0.0, 90.0, 45.0, 135.0)
_BINS = 48
_DIFFERENT = 20.0  # of 255, in any channel, from the background
_STEP = 40.0  # likewise, from one place to the next
_DARKER = (0.4, 0.97)  # what a shadow leaves of a background's light
_SPECK = 0.0006  # of a picture's pixels


@dataclass(frozen=True)
class Box:
    """In pixels; `right` and `bottom` are behind the last."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def centre(self) -> tuple[float, float]:
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2


@dataclass(frozen=True)
class Ground:
    """A background that changes in one direction at most.

    Attributes:
        image: (H, W, 3) float32, 0 .. 255, as if nothing lay on it.
        steps: (H, W) bool: where it changes at once from one colour to another.
        ends: (2, 3): its colours where it begins and ends; at the left, or at the top.
        middle: (3,): halfway.
    """

    image: NDArray[np.float32]
    steps: NDArray[np.bool_]
    ends: NDArray[np.float32]
    middle: NDArray[np.float32]


def ground_of(image: NDArray[np.uint8]) -> Ground:
    """Read off the border: the direction along which it is most even, and the median colour at each place along it.

    Args:
        image: (H, W, 3) uint8.
    """
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    ring = np.ones((height, width), bool)
    ring[_RING_PX:-_RING_PX, _RING_PX:-_RING_PX] = False
    colours = image[ring].astype(np.float32)
    fits = []
    for angle in _ANGLES:
        along = x * math.cos(math.radians(angle)) + y * math.sin(math.radians(angle))
        along = (along - along.min()) / (along.max() - along.min()) * (_BINS - 1)
        places = along[ring]
        bins = places.round().astype(int)
        known = np.unique(bins)
        profile = np.stack([np.median(colours[bins == number], axis=0) for number in known])
        filled = np.stack([np.interp(np.arange(_BINS), known, profile[:, c]) for c in range(3)], axis=1)
        residual = float(np.abs(colours - filled[bins]).clip(max=60).mean())
        fits.append((residual, along, filled))
    _, along, filled = min(fits, key=lambda fit: fit[0])
    smooth = np.stack([np.interp(along, np.arange(_BINS), filled[:, c]) for c in range(3)], axis=2)
    change = np.abs(np.diff(filled, axis=0)).max(axis=1)
    steep = np.concatenate([[0], change]) + np.concatenate([change, [0]]) > _STEP
    steep = np.convolve(steep, np.ones(3), mode="same") > 0  # an autoencoder smears it
    steps = steep[along.round().astype(int)]
    ends = np.stack([np.median(filled[:4], axis=0), np.median(filled[-4:], axis=0)])
    return Ground(
        smooth.astype(np.float32), steps, ends.astype(np.float32), np.median(filled, axis=0).astype(np.float32)
    )


def mask_of(image: NDArray[np.uint8], ground: Ground, *, shadow: bool = False) -> NDArray[np.bool_]:
    """(H, W): where something lies on the ground; without specks.

    Args:
        image: (H, W, 3) uint8.
        ground: of it.
        shadow: leave out what is the ground's colour, only darker.
    """
    from skimage.measure import label
    from skimage.morphology import opening

    pixels = image.astype(np.float32)
    mask = (np.abs(pixels - ground.image).max(axis=2) > _DIFFERENT) & ~ground.steps
    if shadow:
        light = (pixels.sum(axis=2) + 1) / (ground.image.sum(axis=2) + 1)
        same_hue = np.abs(pixels - ground.image * light[..., None]).max(axis=2) < _DIFFERENT / 2
        mask &= ~(same_hue & (light > _DARKER[0]) & (light < _DARKER[1]))
    solid = opening(mask, np.ones((3, 3), bool))  # without smears and hairs
    mask = solid if solid.any() else mask
    least = max(4, int(_SPECK * mask.size))
    kept = label(mask, connectivity=2)
    sizes = np.bincount(kept.ravel())
    sizes[0] = 0
    seen: NDArray[np.bool_] = sizes[kept] >= least
    return seen


def box_of(mask: NDArray[np.bool_]) -> Box | None:
    """Around all that is set."""
    if not mask.any():
        return None
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def halves(mask: NDArray[np.bool_], most: int = 2) -> list[tuple[Box, Box]]:
    """Ways to cut what is seen in two, by a straight line through the widest gaps, or where least is cut."""
    whole = box_of(mask)
    if whole is None:
        return []
    cuts = []
    for axis, (low, high) in ((0, (whole.left, whole.right)), (1, (whole.top, whole.bottom))):
        weight = mask.sum(axis=axis)
        for start, stop in _runs(weight[low:high]):
            cut = low + (start + stop) // 2
            if min(cut - low, high - cut) > 0.15 * (high - low):
                cuts.append((float(weight[cut]), -(stop - start), axis, cut))
    pairs = []
    for _, _, axis, cut in sorted(cuts)[: 2 * most]:
        first, second = mask.copy(), mask.copy()
        if axis == 0:
            first[:, cut:], second[:, :cut] = False, False
        else:
            first[cut:], second[:cut] = False, False
        one, other = box_of(first), box_of(second)
        if one is not None and other is not None:
            pairs.append((one, other))
    return pairs


def _runs(weight: NDArray[np.intp]) -> list[tuple[int, int]]:
    """Where nothing is, and the lightest place if that is nowhere inside."""
    empty = np.concatenate([[False], weight == 0, [False]])
    edges = np.flatnonzero(np.diff(empty.astype(int)))
    runs = [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    third = len(weight) // 6
    if len(weight) > 8:
        place = third + int(weight[third : len(weight) - third].argmin())
        runs.append((place, place + 1))
    return runs
