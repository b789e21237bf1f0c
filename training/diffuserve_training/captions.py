"""Captions for icons: a name, style words and the background's colour, in the ways in which people put them."""

from __future__ import annotations

import random

from diffuserve_training.icons import Icon

STYLE_WORDS = {
    "glossy": ("glossy", "3d", "glossy 3d icon"),
    "flat": ("flat", "flat icon", "flat style"),
    "noto": ("noto", "noto style"),
}
_PREFIXES = ("", "", "a ", "an emoji of ", "a picture of ", "icon of ")
_BACKGROUNDS = ("{} background", "on a {} background", "on {}")
_NAME_SHARE, _TAG_SHARE, _STYLE_SHARE, _WHITE_SHARE = 0.9, 0.15, 0.85, 0.5


def caption(icon: Icon, background: str, choose: random.Random) -> str:
    """One of the ways to ask for the icon on the background.

    A white background is named half of the time, since it is also what one gets who names none.
    """
    what = icon.name
    if icon.tags and choose.random() > _NAME_SHARE:
        what = " ".join(choose.sample(icon.tags, min(len(icon.tags), 2)))
    elif icon.tags and choose.random() < _TAG_SHARE:
        what = f"{what} {choose.choice(icon.tags)}"
    words = []
    if choose.random() < _STYLE_SHARE:
        words.append(choose.choice(STYLE_WORDS[icon.style]))
    if background != "white" or choose.random() < _WHITE_SHARE:
        words.append(choose.choice(_BACKGROUNDS).format(background))
    choose.shuffle(words)
    return ", ".join([choose.choice(_PREFIXES) + what, *words])


def plain_caption(name: str, style: str, background: str) -> str:
    """The one that evaluation uses: "red apple, glossy, on a blue background"."""
    return f"{name}, {STYLE_WORDS[style][0]}, on a {background} background"
