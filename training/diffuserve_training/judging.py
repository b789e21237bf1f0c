"""Whether a picture shows what was asked for, one answer for each thing that was said."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffuserve_training.backgrounds import COLOURS, NAMES, nearest_background
from diffuserve_training.dataset import Icons
from diffuserve_training.description import PLACES, RELATIONS, SOFT, Background, Description
from diffuserve_training.layout import soft_ends
from diffuserve_training.recognition import Gallery, Seen
from diffuserve_training.segment import Box, Ground, box_of, ground_of, halves, mask_of

# How far what is measured may be off what pictures are trained on.
_SIZES = {"small": (0.22, 0.52), "large": (0.64, 1.01)}  # of a box's longer side over the picture's shorter one
_END, _MIDDLE, _ABOUT = 0.33, 0.2, 0.38  # of the free room
_TURNED = {"tilted left": (-48.0, -15.0), "tilted right": (15.0, 48.0), "upside down": (160.0, 200.0)}


@dataclass(frozen=True)
class Verdict:
    """None where nothing was asked.

    Attributes:
        named: every thing is the nearest of all icons' names.
        style: of the things that are nearest.
        background: its kind's colours are nearest to those asked for, where it begins and where it ends.
        place, size, turn, relation: as asked.
    """

    named: bool
    style: bool
    background: bool | None = None
    place: bool | None = None
    size: bool | None = None
    turn: bool | None = None
    relation: bool | None = None


class Judge:
    def __init__(self, icons: Icons) -> None:
        self._icons = icons.icons
        self._gallery = Gallery(icons)

    def __call__(self, image: NDArray[np.uint8], description: Description) -> Verdict:
        """`image`: (H, W, 3) uint8."""
        ground = ground_of(image)
        mask = mask_of(image, ground, shadow=description.shadow)
        boxes, seen = self._seen(image, ground, mask, len(description.things))
        background, place = description.background, description.place
        on_it = None if background is None else _background_fits(ground, background)
        if not boxes:
            return Verdict(False, False, on_it)
        asked = [self._icons[thing.icon] for thing in description.things]
        found = [self._icons[each.icon] for each in seen]
        if len(asked) == 2 and [each.name for each in found] == [each.name for each in reversed(asked)]:
            found, boxes = found[::-1], boxes[::-1]
        named = [each.name for each in found] == [each.name for each in asked]
        size, turn = description.things[0].size, description.things[0].turn
        side = min(image.shape[:2])
        return Verdict(
            named,
            [each.style for each in found] == [each.style for each in asked],
            on_it,
            None if place is None else _is_at(boxes[0], place, image.shape),
            None if size is None else _within(max(boxes[0].width, boxes[0].height) / side, _SIZES[size]),
            None if turn not in _TURNED else _within(seen[0].turn, _TURNED[turn]),
            None if description.relation is None or not named else _relates(boxes, description.relation),
        )

    def _seen(
        self, image: NDArray[np.uint8], ground: Ground, mask: NDArray[np.bool_], count: int
    ) -> tuple[list[Box], list[Seen]]:
        """The things and what they look like; of two, cut where both look most like icons."""
        if count == 1:
            box = box_of(mask)
            return ([], []) if box is None else ([box], [self._gallery.find(image, ground, box)])
        best: tuple[float, list[Box], list[Seen]] = (float("inf"), [], [])
        for boxes in halves(mask):
            seen = [self._gallery.find(image, ground, box) for box in boxes]
            distance = sum(each.distance for each in seen)
            if distance < best[0]:
                best = distance, list(boxes), seen
        return best[1], best[2]


def _within(value: float, bounds: tuple[float, float]) -> bool:
    return bounds[0] <= value <= bounds[1]


def _is_at(box: Box, place: str, shape: tuple[int, ...]) -> bool:
    for axis, wanted in enumerate(PLACES[place]):
        length, low, size = ((shape[1], box.left, box.width), (shape[0], box.top, box.height))[axis]
        share = low / max(1, length - size)
        if wanted == 0:
            width = _MIDDLE if place == "center" else _ABOUT
            fits = abs(share - 0.5) <= width
        else:
            fits = share <= _END if wanted < 0 else share >= 1 - _END
        if not fits:
            return False
    return True


def _relates(boxes: list[Box], relation: str) -> bool:
    """The centres lie so, and further apart along that axis than across it; beside each other is left or right."""
    axis, order = RELATIONS[relation]
    apart = np.subtract(boxes[1].centre, boxes[0].centre)
    if abs(apart[axis]) < abs(apart[1 - axis]):
        return False
    return order == 0 or bool(apart[axis] * order < 0)


def _background_fits(ground: Ground, background: Background) -> bool:
    if background.kind == SOFT:
        middles = np.array([np.mean(soft_ends((red, green, blue)), axis=0) for red, green, blue in COLOURS.tolist()])
        return NAMES[int(np.square(middles - ground.middle).sum(axis=1).argmin())] == background.colours[0]
    asked = background.colours if len(background.colours) == 2 else background.colours * 2
    return tuple(nearest_background(end) for end in ground.ends) == tuple(asked)
