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
_RENDERER = 2  # of the cache's files; another one when what it draws changes


@dataclass(frozen=True)
class Icon:
    """One drawing.

    Attributes:
        name: what it shows, in lower case, as Unicode names it: "red apple".
        style: a key of `STYLES`.
        group: emojibase's: 0 smileys, 1 people, 3 animals, 4 food, 5 places, 6 activities, 7 objects, 8 symbols, 9 flags.
        tags: words that go with it.
        svg: the drawing.
        others: other names for it.
    """

    name: str
    style: str
    group: int
    tags: tuple[str, ...]
    svg: str
    others: tuple[str, ...] = ()


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
    """Draws every icon without the empty space around it, centred; what was drawn before is read from `cache`.

    Args:
        icons: N of them.
        size_px: side of the square canvas.
        margin_px: free on each side; the drawing's longer side takes the rest.
        cache: folder.

    Returns:
        (N, size, size, 4) uint8, red, green, blue and alpha, not premultiplied.
    """
    import hashlib

    from diffuserve.files import write_whole

    digest = hashlib.sha256(f"{_RENDERER} {size_px} {margin_px}".encode())
    for icon in icons:
        digest.update(icon.svg.encode())
    path = cache / f"icons-{digest.hexdigest()[:16]}.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as file:
            drawn: NDArray[np.uint8] = file["drawn"]
        return drawn
    drawn = np.stack([_draw(icon.svg, size_px, margin_px) for icon in icons])
    stream = io.BytesIO()
    np.savez_compressed(stream, drawn=drawn)
    cache.mkdir(parents=True, exist_ok=True)
    write_whole(path, stream.getbuffer())
    return drawn


def extents_of(drawn: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(N, 2): width and height of each drawing, the longer of them 1."""
    seen = drawn[..., 3] > 127
    sides = np.stack([seen.any(axis=1).sum(axis=1), seen.any(axis=2).sum(axis=1)], axis=1).astype(np.float32)
    extents: NDArray[np.float32] = sides / sides.max(axis=1, keepdims=True)
    return extents


def _draw(svg: str, size_px: int, margin_px: int) -> NDArray[np.uint8]:
    import resvg_py
    from PIL import Image

    side = size_px - 2 * margin_px
    # Twice as large as needed, since the space around the drawing is not yet known.
    png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * side, skip_system_fonts=True)
    with Image.open(io.BytesIO(png)) as whole:
        drawn = whole.crop(whole.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox())
    width, height = (max(1, round(length * side / max(drawn.size))) for length in drawn.size)
    fitted = drawn.resize((width, height), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size_px, size_px))
    canvas.paste(fitted, ((size_px - fitted.width) // 2, (size_px - fitted.height) // 2))
    return np.asarray(canvas)
