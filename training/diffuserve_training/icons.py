"""The icons: their names, tags, styles and drawings, from the packages of `diffuserve_training.packages`."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffuserve_training.packages import EMOJIBASE, FLUENT, FLUENT_FLAT, NOTO, Package, TrainingDataError, read_json

STYLES: dict[str, Package] = {"glossy": FLUENT, "flat": FLUENT_FLAT, "noto": NOTO}
_SKIN_TONES = re.compile(r"-(light|medium-light|medium|medium-dark|dark)(-skin-tone)?$")
_RENDERER = 1  # of the cache's files; another one when what it draws changes


@dataclass(frozen=True)
class Icon:
    """One drawing.

    Attributes:
        name: what it shows, in lower case, as Unicode names it: "red apple".
        style: a key of `STYLES`.
        group: emojibase's: 0 smileys, 1 people, 3 animals, 4 food, 5 places, 6 activities, 7 objects, 8 symbols, 9 flags.
        tags: other words for it.
        svg: the drawing.
    """

    name: str
    style: str
    group: int
    tags: tuple[str, ...]
    svg: str


def load_icons(cache: Path, styles: Sequence[str]) -> list[Icon]:
    """All icons of the styles that Unicode names, without the variants of skin tones, in the packages' order.

    Args:
        cache: folder in which the packages are, or are put.
        styles: keys of `STYLES`.

    Raises:
        TrainingDataError: an unknown style, or a package that cannot be had.
    """
    unknown = sorted(set(styles) - set(STYLES))
    if unknown:
        raise TrainingDataError(f"There is no style {unknown[0]!r}; there are {', '.join(STYLES)}.")
    entries = {entry["hexcode"].lower(): entry for entry in read_json(EMOJIBASE, "en/data.json", cache)}
    return [icon for style in styles for icon in _icons_of(style, entries, cache)]


def _icons_of(style: str, entries: dict[str, dict[str, Any]], cache: Path) -> list[Icon]:
    drawings = read_json(STYLES[style], "icons.json", cache)
    entry_of: dict[str, dict[str, Any]] = {}
    # The glossy set says nothing about characters, but has the flat one's keys.
    names = FLUENT_FLAT if style == "glossy" else STYLES[style]
    for hexcode, key in read_json(names, "chars.json", cache).items():
        # Variation selectors and joiners are left out by some and not by others.
        entry = entries.get(hexcode) or entries.get(f"{hexcode}-fe0f") or entries.get(hexcode.replace("-fe0f", ""))
        if entry is not None and "group" in entry:
            entry_of.setdefault(key, entry)
    icons = []
    for key, drawing in drawings["icons"].items():
        entry = entry_of.get(key)
        if entry is None or _SKIN_TONES.search(key):
            continue
        width = drawing.get("width", drawings.get("width", 16))
        height = drawing.get("height", drawings.get("height", 16))
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{drawing["body"]}</svg>'
        icons.append(Icon(entry["label"].lower(), style, entry["group"], tuple(entry.get("tags", ())), svg))
    return icons


def rasterise(icons: Sequence[Icon], size_px: int, margin_px: int, cache: Path) -> NDArray[np.uint8]:
    """Draws every icon, centred; what was drawn before is read from `cache`.

    Returns:
        (N, size, size, 4) uint8, red, green, blue and alpha, not premultiplied.
    """
    import hashlib

    from diffuserve.files import write_whole

    digest = hashlib.sha256(f"{_RENDERER} {size_px} {margin_px}".encode())
    for icon in icons:
        digest.update(icon.svg.encode())
    path = cache / f"icons-{digest.hexdigest()[:16]}.npy"
    if path.is_file():
        drawn: NDArray[np.uint8] = np.load(path, allow_pickle=False)
        return drawn
    drawn = np.stack([_draw(icon.svg, size_px, margin_px) for icon in icons])
    stream = io.BytesIO()
    np.save(stream, drawn, allow_pickle=False)
    cache.mkdir(parents=True, exist_ok=True)
    write_whole(path, stream.getbuffer())
    return drawn


def _draw(svg: str, size_px: int, margin_px: int) -> NDArray[np.uint8]:
    import resvg_py
    from PIL import Image

    side = size_px - 2 * margin_px
    # The height follows from the drawing's proportions; the longer side is the given one.
    drawn = Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, width=side, skip_system_fonts=True)))
    drawn.thumbnail((side, side), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size_px, size_px))
    canvas.paste(drawn, ((size_px - drawn.width) // 2, (size_px - drawn.height) // 2))
    return np.asarray(canvas)
