"""Pictures that fit descriptions: where each thing is, how large and turned, and on what. What is said is kept to, and what is
left open is drawn at random, but for shadows, which are there only where they are asked for."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffuserve_training.backgrounds import BACKGROUNDS
from diffuserve_training.description import (
    GRADIENT,
    HANDED,
    PLACES,
    RELATIONS,
    SOFT,
    TWO,
    Background,
    Description,
    Thing,
)
from diffuserve_training.icons import Icon

# A thing's longer side over the picture's shorter one, alone and beside another.
SINGLE = {"small": (0.30, 0.42), "large": (0.74, 0.90), None: (0.30, 0.90)}
PAIR = {"small": (0.26, 0.33), "large": (0.46, 0.54), None: (0.32, 0.48)}
_PLACED_MOST = 0.62  # the largest thing of which one still sees where it lies
_TURNED_MOST = 0.75
_EDGE = 0.02  # of the shorter side, left free all around
_TURN_DEGREES = {"tilted left": (-38, -20), "tilted right": (20, 38), "upside down": (170, 190), None: (-12, 12)}
_END_ROOM, _MIDDLE_ROOM = 0.18, 0.09  # of the free room, for what lies at an end or in the middle
Colour = tuple[float, float, float]
_ANGLES = (0.0, 90.0, 45.0)  # across the picture, downwards, and both; other ends would turn the colours' order


@dataclass(frozen=True)
class Laid:
    """A thing in a picture.

    Attributes:
        icon: index.
        x: of its box's centre, in pixels from the left.
        y: likewise from the top.
        size_px: the drawing's longer side before it is turned.
        turn: clockwise, in radians, after it was mirrored.
        mirrored: left is right.
    """

    icon: int
    x: float
    y: float
    size_px: float
    turn: float
    mirrored: bool


@dataclass(frozen=True)
class Picture:
    """Attributes:
    things: one or two.
    colours: (2, 3) of 0 .. 255: before the ramp and behind it.
    ramp: unit x and y of the direction, offset and softness in pixels: the second colour's share is
        clip((x * px + y * py - offset) / softness + 1/2, 0, 1), with p from the picture's centre.
    shadow: its strength, 0 .. 1.
    """

    things: tuple[Laid, ...]
    colours: tuple[Colour, Colour]
    ramp: tuple[float, float, float, float]
    shadow: float


def lay_out(
    description: Description,
    icons: Sequence[Icon],
    extents: NDArray[np.float32],
    size: tuple[int, int],
    choose: random.Random,
    background_of: Callable[[Sequence[int], random.Random], Background],
) -> Picture:
    """A picture of what is described.

    Args:
        description: whose icons are indices into `icons`.
        icons: all.
        extents: (N, 2), width and height of each drawing, the longer of them 1.
        size: width and height in pixels.
        choose: where chance comes from.
        background_of: chooses a background for icons where the description leaves it open.
    """
    side = min(size)
    turned = [_turned(thing, icons[thing.icon], choose) for thing in description.things]
    ranges = SINGLE if len(turned) == 1 else PAIR
    sizes = []
    for thing in description.things:
        low, high = ranges[thing.size]
        if description.place not in (None, "center"):
            high = min(high, _PLACED_MOST)
        if thing.turn is not None:
            high = min(high, _TURNED_MOST)
        sizes.append(choose.uniform(min(low, high), high))
    boxes = [
        _box(extents[thing.icon], turn, part * side)
        for thing, (turn, _), part in zip(description.things, turned, sizes, strict=True)
    ]
    edge = _EDGE * side
    if len(turned) == 1:
        centres = [_placed(description.place, boxes[0], size, edge, choose)]
        shrink = 1.0
    else:
        centres, shrink = _side_by_side(description.relation, boxes, size, edge, choose)
    things = tuple(
        Laid(thing.icon, x, y, part * side * shrink, turn, mirrored)
        for thing, (x, y), part, (turn, mirrored) in zip(description.things, centres, sizes, turned, strict=True)
    )
    background = description.background or background_of([thing.icon for thing in description.things], choose)
    colours, ramp = _ramp(background, size, choose)
    shadow = choose.uniform(0.35, 0.6) if description.shadow else 0.0
    return Picture(things, colours, ramp, shadow)


def _turned(thing: Thing, icon: Icon, choose: random.Random) -> tuple[float, bool]:
    turn = choose.choice(("tilted left", "tilted right")) if thing.turn == "tilted" else thing.turn
    mirrored = thing.mirrored or (icon.name not in HANDED and choose.random() < 0.5)
    return math.radians(choose.uniform(*_TURN_DEGREES[turn])), mirrored


def _box(extent: NDArray[np.float32], turn: float, size_px: float) -> tuple[float, float]:
    """Width and height of what a turned ellipse would need, which fits a drawing better than its box's corners do."""
    width, height = float(extent[0]) * size_px, float(extent[1]) * size_px
    cosine, sine = math.cos(turn), math.sin(turn)
    return math.hypot(width * cosine, height * sine), math.hypot(width * sine, height * cosine)


def _placed(
    place: str | None, box: tuple[float, float], size: tuple[int, int], edge: float, choose: random.Random
) -> tuple[float, float]:
    centre = []
    wanted = PLACES[place] if place is not None else (None, None)
    for axis in (0, 1):
        room = max(0.0, size[axis] - 2 * edge - box[axis])
        where = wanted[axis]
        if where is None:
            share = choose.random()
        elif where == 0:
            # "on the left" says little of the height, "in the center" all.
            width = _MIDDLE_ROOM if place == "center" else 0.25
            share = choose.uniform(0.5 - width, 0.5 + width)
        else:
            share = choose.uniform(0, _END_ROOM)
            share = 1 - share if where > 0 else share
        centre.append(edge + box[axis] / 2 + share * room)
    return centre[0], centre[1]


def _side_by_side(
    relation: str | None, boxes: list[tuple[float, float]], size: tuple[int, int], edge: float, choose: random.Random
) -> tuple[list[tuple[float, float]], float]:
    """Two things that do not overlap, and by what both are made smaller to fit."""
    if relation is not None:
        axis, order = RELATIONS[relation]
    elif size[0] == size[1]:
        axis, order = int(choose.random() < 0.3), 0
    else:
        axis, order = int(size[1] > size[0]), 0
    if order == 0:
        order = choose.choice((-1, 1))
    along = size[axis] - 2 * edge
    needed = boxes[0][axis] + boxes[1][axis]
    shrink = min(1.0, 0.98 * along / needed)
    boxes = [(width * shrink, height * shrink) for width, height in boxes]
    free = along - boxes[0][axis] - boxes[1][axis]
    cuts = sorted((choose.random(), choose.random()))
    first, second = (0, 1) if order < 0 else (1, 0)
    across = 1 - axis
    centres = [[0.0, 0.0], [0.0, 0.0]]
    centres[first][axis] = edge + cuts[0] * free + boxes[first][axis] / 2
    centres[second][axis] = edge + cuts[1] * free + boxes[first][axis] + boxes[second][axis] / 2
    level = choose.random()
    for index in (0, 1):  # nearly level, so that "left of" is not also "above"
        room = max(0.0, size[across] - 2 * edge - boxes[index][across])
        share = min(1.0, max(0.0, level + choose.uniform(-0.2, 0.2)))
        centres[index][across] = edge + boxes[index][across] / 2 + share * room
    return [(x, y) for x, y in centres], shrink


def _ramp(
    background: Background, size: tuple[int, int], choose: random.Random
) -> tuple[tuple[Colour, Colour], tuple[float, float, float, float]]:
    red, green, blue = BACKGROUNDS[background.colours[0]]
    before = behind = (float(red), float(green), float(blue))
    angle = math.radians(choose.choice(_ANGLES))
    x, y = math.cos(angle), math.sin(angle)
    across = abs(x) * size[0] + abs(y) * size[1]
    offset, softness = 0.0, 1.0
    if background.kind in (TWO, GRADIENT):
        red, green, blue = BACKGROUNDS[background.colours[1]]
        behind = (float(red), float(green), float(blue))
        offset = across * choose.uniform(-0.08, 0.08)
        softness = 1.0 if background.kind == TWO else across * choose.uniform(0.6, 1.0)
    elif background.kind == SOFT:
        before, behind = soft_ends(before)
        softness = across
    return (before, behind), (x, y, offset, softness)


def soft_ends(colour: Colour) -> tuple[Colour, Colour]:
    """Between which a soft gradient of a colour lies: lighter and darker."""
    red, green, blue = colour
    return (red + 0.4 * (255 - red), green + 0.4 * (255 - green), blue + 0.4 * (255 - blue)), (
        red * 0.82,
        green * 0.82,
        blue * 0.82,
    )
