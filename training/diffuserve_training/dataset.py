"""Training data by step: everything that is random in step n follows from the seed and n alone, so that a run that was
killed and resumed goes on as if nothing had happened, and every device draws its own."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset

from diffuserve_training.backgrounds import COLOURS, NAMES, lay_on
from diffuserve_training.captions import caption
from diffuserve_training.config import ConfigError, Data, read_names
from diffuserve_training.icons import Icon, load_icons, rasterise


@dataclass(frozen=True)
class Icons:
    """The icons of a training and their drawings, (N, size, size, 4) uint8."""

    icons: list[Icon]
    drawn: NDArray[np.uint8]

    @classmethod
    def load(cls, config: Path, data: Data, cache: Path) -> Icons:
        """Raises `ConfigError` if the data names an icon that a style does not have."""
        icons = load_icons(cache, data.styles)
        names = read_names(config, data)
        if names is not None:
            missing = sorted(names - {icon.name for icon in icons})
            if missing:
                raise ConfigError(f"{data.names} names {missing[0]!r}, which no style of {', '.join(data.styles)} has.")
            icons = [icon for icon in icons if icon.name in names]
        return cls(icons, rasterise(icons, data.size_px, data.margin_px, cache))


def is_held_out(name: str, background: str, share: float) -> bool:
    """Whether a combination is kept from training, in every style; the same on every machine."""
    digest = hashlib.sha256(f"{name}|{background}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


class Steps(IterableDataset[Any]):
    """Batches from step `start()` on, without an end; it is asked when they begin, since a run that goes on knows its step
    only after the loader has been made."""

    def __init__(self, batch_of: Callable[[int], Any], start: Callable[[], int]) -> None:
        self._batch_of = batch_of
        self._start = start

    def __iter__(self) -> Iterator[Any]:
        step = self._start()
        while True:
            yield self._batch_of(step)
            step += 1


def image_batch(
    icons: Icons, *, seed: tuple[int, ...], batch_size: int, crop_px: int | None = None
) -> NDArray[np.float32]:
    """Icons on plain colours: one of the twelve, or in half of the images any.

    Returns:
        (batch, 3, H, W) float32 in -1 .. 1.
    """
    choose = np.random.default_rng(seed)
    chosen = choose.integers(len(icons.icons), size=batch_size)
    colours = COLOURS[choose.integers(len(COLOURS), size=batch_size)]
    anything = choose.integers(256, size=(batch_size, 3), dtype=np.uint8)
    colours = np.where(choose.random((batch_size, 1)) < 0.5, colours, anything)
    images = lay_on(icons.drawn[chosen], colours)
    if crop_px is not None:
        top, left = choose.integers(images.shape[1] - crop_px + 1, size=2)
        images = images[:, top : top + crop_px, left : left + crop_px]
    return to_unit(images)


def to_unit(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(N, H, W, 3) uint8 to (N, 3, H, W) float32 in -1 .. 1."""
    scaled: NDArray[np.float32] = images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    return np.ascontiguousarray(scaled)


@dataclass(frozen=True)
class Latents:
    """Every icon on every background, encoded once.

    Attributes:
        icons: N of them.
        encoded: (N, 12, C, h, w) float16, scaled to unit variance.
        held_out: share of the combinations that are never drawn.
    """

    icons: list[Icon]
    encoded: NDArray[np.float16]
    held_out: float

    def batch(self, seed: tuple[int, ...], batch_size: int, empty: float) -> tuple[NDArray[np.float32], list[str]]:
        """Latents (batch, C, h, w) float32 and their captions, of which the share `empty` is empty."""
        choose = random.Random(str(seed))  # noqa: S311 - training data, no secret
        latents: list[NDArray[np.float16]] = []
        captions: list[str] = []
        while len(captions) < batch_size:
            index, background = choose.randrange(len(self.icons)), choose.randrange(len(NAMES))
            icon = self.icons[index]
            if is_held_out(icon.name, NAMES[background], self.held_out):
                continue
            latents.append(self.encoded[index, background])
            captions.append("" if choose.random() < empty else caption(icon, NAMES[background], choose))
        return np.stack(latents).astype(np.float32), captions
