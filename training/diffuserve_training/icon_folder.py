"""Icons as a folder of pictures with captions, which is what a LoRA is trained on."""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image

from diffuserve.files import write_whole
from diffuserve_training.backgrounds import COLOURS, NAMES, lay_on
from diffuserve_training.captions import caption
from diffuserve_training.dataset import Icons

_BACKGROUNDS_AN_ICON = 2


def write_icons(icons: Icons, folder: Path, seed: int = 0) -> int:
    """Every icon on two backgrounds, NUMBER.png, and metadata.jsonl.

    Returns:
        The number of pictures.
    """
    choose = random.Random(seed)  # noqa: S311 - training data, no secret
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for icon, drawn in zip(icons.icons, icons.drawn, strict=True):
        for background in choose.sample(range(len(NAMES)), _BACKGROUNDS_AN_ICON):
            name = f"{len(lines):05}.png"
            [image] = lay_on(drawn[None], COLOURS[background][None])
            Image.fromarray(image).save(folder / name)
            lines.append(json.dumps({"file_name": name, "text": caption(icon, NAMES[background], choose)}))
    write_whole(folder / "metadata.jsonl", ("\n".join(lines) + "\n").encode())
    return len(lines)
