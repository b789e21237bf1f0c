"""A folder of pictures with captions, as LoRAs are trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffuserve_training.config import ConfigError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Picture:
    path: Path
    caption: str


def read_pictures(folder: Path, prompt: str | None) -> list[Picture]:
    """Every picture of a folder in the order of their names.

    Args:
        folder: described in `diffuserve_training.config.Lora`.
        prompt: the caption of those that have none.

    Raises:
        ConfigError: there are no pictures, one has no caption, or metadata.jsonl cannot be read.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder of pictures.")
    captions = _metadata(folder / "metadata.jsonl")
    pictures = []
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES):
        text = path.with_suffix(".txt")
        caption = text.read_text().strip() if text.is_file() else captions.get(path.name, prompt)
        if caption is None:
            raise ConfigError(
                f"{path} has no caption: write {text.name} beside it, a line in metadata.jsonl, or `prompt` in the configuration."
            )
        pictures.append(Picture(path, caption))
    if not pictures:
        raise ConfigError(f"{folder} holds no pictures ({', '.join(_SUFFIXES)}).")
    return pictures


def _metadata(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        return {line["file_name"]: line["text"] for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f'{path} cannot be read ({error}); each line must be like {{"file_name": "1.png", "text": "a caption"}}.'
        ) from None


def load_square(path: Path, size_px: int) -> NDArray[np.uint8]:
    """The middle of a picture, (size, size, 3) uint8.

    Raises:
        ConfigError: it is no picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            square = ImageOps.fit(image.convert("RGB"), (size_px, size_px), Image.Resampling.LANCZOS)
    except (UnidentifiedImageError, OSError) as error:
        raise ConfigError(f"{path} is no picture: {error}") from None
    return np.asarray(square)
