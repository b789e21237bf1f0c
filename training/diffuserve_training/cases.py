"""The fixed captions of an evaluation, in groups that ask for different things."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from diffuserve_training.backgrounds import NAMES
from diffuserve_training.captions import plain_caption
from diffuserve_training.description import (
    GRADIENT,
    KINDS,
    PLACES,
    RELATIONS,
    SIZES,
    TWO,
    Background,
    Description,
    HeldOut,
    Thing,
)
from diffuserve_training.icons import Icon

ALONE, NEW_COLOUR, PLACED, SIZED, TURNED, PAIR, NEW_PAIR = (
    "a thing",
    "a thing on a new colour",
    "a thing in a place",
    "a thing of a size",
    "a turned thing",
    "a pair",
    "a new pair",
)
SHARES = {ALONE: 0.28, NEW_COLOUR: 0.1, PLACED: 0.15, SIZED: 0.12, TURNED: 0.05, PAIR: 0.12, NEW_PAIR: 0.18}
_SEED = 20
_PLAIN_SHARE = 0.6
_TURNS = ("tilted left", "tilted right", "upside down")


@dataclass(frozen=True)
class Case:
    """One picture to draw. `group`: a key of `SHARES`."""

    group: str
    description: Description
    prompt: str
    seed: int


def cases_of(icons: Sequence[Icon], styles: Sequence[str], held_out: float, count: int) -> list[Case]:
    """`count` fixed cases of the styles, the groups in turn, each as often as its share says."""
    choose = random.Random(_SEED)  # noqa: S311 - a choice of captions, no secret
    withheld = HeldOut(held_out)
    allowed = [index for index, icon in enumerate(icons) if icon.style in styles]
    owed = dict.fromkeys(SHARES, 0.0)
    cases = []
    for seed in range(count):
        for group, share in SHARES.items():
            owed[group] += share
        group = max(owed, key=lambda each: owed[each])
        owed[group] -= 1
        description = _description(group, icons, allowed, withheld, choose)
        cases.append(Case(group, description, plain_caption(description, icons), seed))
    return cases


def _description(
    group: str,
    icons: Sequence[Icon],
    allowed: Sequence[int],
    withheld: Callable[[str, str], bool],
    choose: random.Random,
) -> Description:
    pair = group in (PAIR, NEW_PAIR)
    for _ in range(10_000):
        chosen = [choose.choice(allowed)]
        if pair:
            chosen.append(choose.choice(allowed))
            names = [icons[icon].name for icon in chosen]
            if icons[chosen[0]].style != icons[chosen[1]].style or names[0] == names[1]:
                continue
            if withheld(names[0], names[1]) != (group == NEW_PAIR):
                continue
        kind = KINDS[0] if choose.random() < _PLAIN_SHARE else choose.choice(KINDS[1:])
        colours = tuple(choose.sample(NAMES, 2 if kind in (TWO, GRADIENT) else 1))
        kept = [withheld(icons[icon].name, colour) for icon in chosen for colour in colours]
        if any(kept) != (group == NEW_COLOUR):
            continue
        description = Description(tuple(Thing(icon) for icon in chosen), background=Background(kind, colours))
        if pair:
            return replace(description, relation=choose.choice((None, *RELATIONS)))
        if group == PLACED:
            return replace(description, place=choose.choice(tuple(PLACES)))
        if group == SIZED:
            return replace(description, things=(Thing(chosen[0], size=choose.choice(SIZES)),))
        if group == TURNED:
            return replace(description, things=(Thing(chosen[0], turn=choose.choice(_TURNS)),))
        return description
    raise ValueError(f"the icons have nothing for {group!r}: there are too few, or nothing is held out")
