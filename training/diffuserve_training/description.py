"""What a caption says of a picture: things, and all else that may be said or left unsaid."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diffuserve_training.backgrounds import NAMES
from diffuserve_training.icons import Icon

SIZES = ("small", "large")
TURNS = ("tilted", "tilted left", "tilted right", "upside down")
PLACES = {
    "top left": (-1, -1),
    "top": (0, -1),
    "top right": (1, -1),
    "left": (-1, 0),
    "center": (0, 0),
    "right": (1, 0),
    "bottom left": (-1, 1),
    "bottom": (0, 1),
    "bottom right": (1, 1),
}
"""Where the thing's box lies in x and y: at the beginning, in the middle, at the end."""
RELATIONS = {
    "left of": (0, -1),
    "right of": (0, 1),
    "above": (1, -1),
    "below": (1, 1),
    "next to": (0, 0),
}
"""The axis (0 for x) along which the first thing lies before (-1) or behind (1) the second, 0 for either."""
PLAIN, TWO, GRADIENT, SOFT = "plain", "two", "gradient", "soft"
KINDS = (PLAIN, TWO, GRADIENT, SOFT)
# Drawings with lettering or a direction that everyone knows: never mirrored unless it is asked for.
HANDED = frozenset(
    {
        "stop sign",
        "pool 8 ball",
        "musical note",
        "credit card",
        "alarm clock",
        "watch",
        "globe showing americas",
        "compass",
    }
)
_SIZE_SHARE, _TURN_SHARE, _MIRROR_SHARE, _PLACE_SHARE, _RELATION_SHARE = 0.3, 0.12, 0.08, 0.35, 0.7
_BACKGROUND_SHARE, _STYLE_SHARE, _SHADOW_SHARE = 0.88, 0.85, 0.15
_SIZES_OF_TWO: tuple[tuple[str | None, str | None], ...] = (
    ("small", None),
    (None, "small"),
    ("large", None),
    (None, "large"),
    ("small", "large"),
    ("large", "small"),
)
_KIND_SHARES = (0.6, 0.15, 0.15, 0.1)


@dataclass(frozen=True)
class Background:
    """`kind`: of `KINDS`; `colours`: names, the one at the left or the top first; one for plain and soft, else two."""

    kind: str
    colours: tuple[str, ...]


@dataclass(frozen=True)
class Thing:
    """`icon`: index; `size` of `SIZES` and `turn` of `TURNS`, None where nothing is said."""

    icon: int
    size: str | None = None
    turn: str | None = None
    mirrored: bool = False


@dataclass(frozen=True)
class Description:
    """What is said.

    Attributes:
        things: one or two.
        relation: of the first to the second, of `RELATIONS`; None where they are joined by "and".
        place: of a single thing, of `PLACES`.
        background: None leaves it open.
        shadow: whether one is asked for.
        style: whether the icons' style is named.
    """

    things: tuple[Thing, ...]
    relation: str | None = None
    place: str | None = None
    background: Background | None = None
    shadow: bool = False
    style: bool = True


class HeldOut:
    """The combinations that are kept from training: of names with colours, and of names with names; the same on every
    machine and in every style."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._known: dict[tuple[str, str], bool] = {}

    def __call__(self, name: str, other: str) -> bool:
        """Whether a name and a colour, or two names in either order, are kept from training."""
        key = (name, other)
        if key not in self._known:
            first, second = (name, other) if other in NAMES else sorted(key)
            digest = hashlib.sha256(f"{first}|{second}".encode()).digest()
            self._known[key] = int.from_bytes(digest[:4], "big") < self._share * 2**32
        return self._known[key]


class Describer:
    """Draws descriptions of what a model is trained on."""

    def __init__(self, icons: Sequence[Icon], held_out: Callable[[str, str], bool]) -> None:
        self._icons = icons
        self._held_out = held_out
        self._of_style: dict[str, list[int]] = {}
        for index, icon in enumerate(icons):
            self._of_style.setdefault(icon.style, []).append(index)

    def __call__(self, choose: random.Random, things: int) -> Description:
        """`things`: how many, 1 or 2."""
        icons = self.icons(choose, things)
        said = choose.random
        style, shadow = said() < _STYLE_SHARE, said() < _SHADOW_SHARE
        background = self.background(icons, choose) if said() < _BACKGROUND_SHARE else None
        if things == 2:
            relation = choose.choice(tuple(RELATIONS)) if said() < _RELATION_SHARE else None
            sizes = choose.choice(_SIZES_OF_TWO)
            if said() > _SIZE_SHARE / 2:
                sizes = (None, None)
            pair = tuple(Thing(icon, size) for icon, size in zip(icons, sizes, strict=True))
            return Description(pair, relation, None, background, shadow, style)
        place = choose.choice(tuple(PLACES)) if said() < _PLACE_SHARE else None
        size = choose.choice(SIZES) if said() < _SIZE_SHARE else None
        if size == "large" and place is not None:
            size = None  # there is no room
        thing = Thing(
            icons[0],
            size,
            choose.choice(TURNS) if said() < _TURN_SHARE else None,
            said() < _MIRROR_SHARE,
        )
        return Description((thing,), None, place, background, shadow, style)

    def icons(self, choose: random.Random, count: int) -> tuple[int, ...]:
        """One icon, or two of one style and two names that may be seen together."""
        first = choose.randrange(len(self._icons))
        if count == 1:
            return (first,)
        icon = self._icons[first]
        while True:
            second = choose.choice(self._of_style[icon.style])
            name = self._icons[second].name
            if name != icon.name and not self._held_out(icon.name, name):
                return first, second

    def background(self, icons: Sequence[int], choose: random.Random) -> Background:
        """Any on which these icons may be seen."""
        kind = choose.choices(KINDS, _KIND_SHARES)[0]
        names = [self._icons[icon].name for icon in icons]
        colours: list[str] = []
        while len(colours) < (2 if kind in (TWO, GRADIENT) else 1):
            colour = choose.choice(NAMES)
            if colour not in colours and not any(self._held_out(name, colour) for name in names):
                colours.append(colour)
        return Background(kind, tuple(colours))
