"""Icons as a folder of pictures with captions, which is what a LoRA is trained on."""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image

from diffuserve.files import write_whole
from diffuserve_training.captions import caption
from diffuserve_training.compose import compose, pixels_of
from diffuserve_training.config import Data
from diffuserve_training.dataset import Icons, Pictures

_PICTURES_AN_ICON = 2


def write_icons(icons: Icons, data: Data, folder: Path, seed: int = 0) -> int:
    """About two pictures an icon, NUMBER.png, and metadata.jsonl.

    Returns:
        The number of pictures.
    """
    choose = random.Random(seed)  # noqa: S311 - training data, no secret
    folder.mkdir(parents=True, exist_ok=True)
    layout, descriptions = Pictures(icons, data).native(_PICTURES_AN_ICON * len(icons.icons), choose)
    images = pixels_of(compose(icons.atlas, layout))
    lines = []
    for number, (image, description) in enumerate(zip(images, descriptions, strict=True)):
        name = f"{number:05}.png"
        Image.fromarray(image).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": caption(description, icons.icons, choose)}))
    write_whole(folder / "metadata.jsonl", ("\n".join(lines) + "\n").encode())
    return len(lines)
