"""Captions: what is said of a picture, in the ways in which people put it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from diffuserve_training.description import GRADIENT, PLAIN, SOFT, TWO, Description, Thing
from diffuserve_training.icons import Icon

STYLE_WORDS = {
    "glossy": ("glossy", "3d", "glossy 3d icon"),
    "flat": ("flat", "flat icon", "flat style"),
    "noto": ("noto", "noto style"),
}
PLACE_WORDS = {
    "top left": ("top left", "in the top left corner", "at the top left"),
    "top": ("at the top", "top"),
    "top right": ("top right", "in the top right corner", "at the top right"),
    "left": ("on the left", "left"),
    "center": ("in the center", "centered", "in the middle"),
    "right": ("on the right", "right"),
    "bottom left": ("bottom left", "in the bottom left corner", "at the bottom left"),
    "bottom": ("at the bottom", "bottom"),
    "bottom right": ("bottom right", "in the bottom right corner", "at the bottom right"),
}
RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "next to": ("next to", "beside"),
}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
BACKGROUND_WORDS = {
    PLAIN: ("on a {} background", "{} background", "on {}"),
    TWO: ("on a {} and {} background", "{} and {} background", "on {} and {}"),
    GRADIENT: ("on a {} to {} gradient", "{} to {} gradient", "on a gradient from {} to {}"),
    SOFT: ("on a soft {} gradient", "soft {} gradient", "on a soft {} background"),
}
SHADOW_WORDS = ("with a shadow", "with a soft shadow")
_PREFIXES = ("", "", "", "an emoji of ", "a picture of ", "icon of ")
_TAG_SHARE, _TAGS_ALONE_SHARE, _ADJECTIVE_SHARE, _ARTICLE_SHARE = 0.08, 0.05, 0.7, 0.6


def caption(description: Description, icons: Sequence[Icon], choose: random.Random) -> str:
    """One of the ways to say it."""
    apart: list[str] = []  # what is said of a single thing behind its name

    def called(thing: Thing) -> str:
        icon = icons[thing.icon]
        name = choose.choice((icon.name, *icon.others))
        if len(description.things) == 1 and icon.tags:
            share = choose.random()
            if share < _TAGS_ALONE_SHARE:
                name = " ".join(choose.sample(icon.tags, min(len(icon.tags), 2)))
            elif share < _TAGS_ALONE_SHARE + _TAG_SHARE:
                name = f"{name} {choose.choice(icon.tags)}"
        before = []
        for word in _adjectives(thing, choose):
            if len(description.things) == 2 or (choose.random() < _ADJECTIVE_SHARE and " " not in word):
                before.append(word)
            else:
                apart.append(word)
        return _with_article(" ".join([*before, name]), choose.random() < _ARTICLE_SHARE)

    things = [called(thing) for thing in description.things]
    if len(things) == 1:
        what = things[0]
    elif description.relation is None:
        what = " and ".join(things)
    else:
        what = f"{things[0]} {choose.choice(RELATION_WORDS[description.relation])} {things[1]}"
    if description.style:
        apart.append(choose.choice(STYLE_WORDS[icons[description.things[0].icon].style]))
    if description.place is not None:
        apart.append(choose.choice(PLACE_WORDS[description.place]))
    if description.background is not None:
        words = choose.choice(BACKGROUND_WORDS[description.background.kind])
        apart.append(words.format(*description.background.colours))
    choose.shuffle(apart)
    if description.shadow:
        apart.append(choose.choice(SHADOW_WORDS))
    return ", ".join([choose.choice(_PREFIXES) + what, *apart])


def plain_caption(description: Description, icons: Sequence[Icon]) -> str:
    """The one that evaluation uses: "a small panda, flat, top right, on a teal background"."""

    def called(thing: Thing) -> str:
        words = [word for word in (thing.size, thing.turn, "mirrored" if thing.mirrored else None) if word]
        return _with_article(" ".join([*words, icons[thing.icon].name]), True)

    things = [called(thing) for thing in description.things]
    parts = [f" {description.relation or 'and'} ".join(things)]
    if description.style:
        parts.append(STYLE_WORDS[icons[description.things[0].icon].style][0])
    if description.place is not None:
        parts.append(PLACE_WORDS[description.place][0])
    if description.background is not None:
        parts.append(BACKGROUND_WORDS[description.background.kind][0].format(*description.background.colours))
    if description.shadow:
        parts.append(SHADOW_WORDS[0])
    return ", ".join(parts)


def vocabulary(styles: Sequence[str]) -> list[str]:
    """Every word that a caption has besides names, tags and colours."""
    tables: tuple[Mapping[str, Sequence[str]], ...] = (PLACE_WORDS, RELATION_WORDS, SIZE_WORDS)
    words = [word for table in tables for choices in table.values() for word in choices]
    return [*words, *SHADOW_WORDS, *(word for style in styles for word in STYLE_WORDS[style])]


def _adjectives(thing: Thing, choose: random.Random) -> list[str]:
    words = []
    if thing.size is not None:
        words.append(choose.choice(SIZE_WORDS[thing.size]))
    if thing.turn is not None:
        words.append(thing.turn)
    if thing.mirrored:
        words.append("mirrored")
    return words


def _with_article(words: str, wanted: bool) -> str:
    if not wanted:
        return words
    return f"{'an' if words[0] in 'aeio' else 'a'} {words}"
