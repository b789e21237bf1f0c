"""Training data by step: everything that is random in step n follows from the seed and n alone, so that a run that was
killed and resumed goes on as if nothing had happened, and every device draws its own."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from diffuserve_training.compose import MARGIN_PX, SPRITE_PX, Layout, atlas_of
from diffuserve_training.config import ConfigError, Data, read_names
from diffuserve_training.description import Describer, Description, HeldOut
from diffuserve_training.icons import Icon, extents_of, load_icons, rasterise
from diffuserve_training.layout import lay_out

_PAIR_SHARE = 0.4


@dataclass(frozen=True)
class Icons:
    """The icons of a training and their drawings, (N, 160, 160, 4) uint8."""

    icons: list[Icon]
    drawn: NDArray[np.uint8]

    @classmethod
    def load(cls, config: Path, data: Data, cache: Path) -> Icons:
        """Raises `ConfigError` if the data names an icon that a style does not have."""
        icons = load_icons(cache, data.styles)
        names = read_names(config, data)
        if names is not None:
            missing = sorted(set(names) - {icon.name for icon in icons})
            if missing:
                raise ConfigError(f"{data.names} names {missing[0]!r}, which no style of {', '.join(data.styles)} has.")
            icons = [replace(icon, others=names[icon.name]) for icon in icons if icon.name in names]
        return cls(icons, rasterise(icons, SPRITE_PX, MARGIN_PX, cache))

    @cached_property
    def extents(self) -> NDArray[np.float32]:
        """(N, 2): width and height of each drawing, the longer of them 1."""
        return extents_of(self.drawn)

    @cached_property
    def atlas(self) -> Tensor:
        """As `compose` takes it."""
        return atlas_of(self.drawn)


class Steps(IterableDataset[Any]):
    """Batches from step `start()` on, without an end; it is asked when they begin, since a run that goes on knows its step
    only after the loader has been made. Workers take turns."""

    def __init__(self, batch_of: Callable[[int], Any], start: Callable[[], int]) -> None:
        self._batch_of = batch_of
        self._start = start

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        step = self._start() + (worker.id if worker else 0)
        while True:
            yield self._batch_of(step)
            step += worker.num_workers if worker else 1


class Pictures:
    """What pictures are trained on: their layouts and descriptions by seed."""

    def __init__(self, icons: Icons, data: Data) -> None:
        self._icons = icons
        self._data = data
        self._describe = Describer(icons.icons, HeldOut(data.held_out))

    def batch(self, seed: tuple[int, ...], batch_size: int) -> tuple[Layout, list[Description], random.Random]:
        """About as many pixels as `batch_size` native pictures have, all of one size.

        Returns:
            The pictures, what is said of them, and where further chance comes from.
        """
        choose = random.Random(str(seed))  # noqa: S311 - training data, no secret
        sizes = [(width, height) for width, height, _ in self._data.sizes]
        [size] = choose.choices(sizes, [share for _, _, share in self._data.sizes])
        count = max(1, batch_size * self._data.size_px**2 // (size[0] * size[1]))
        return *self._of_size(size, count, choose), choose

    def native(self, count: int, choose: random.Random) -> tuple[Layout, list[Description]]:
        """Pictures of the native size, and what is said of them."""
        return self._of_size((self._data.size_px, self._data.size_px), count, choose)

    def crops(self, seed: tuple[int, ...], batch_size: int, side: int) -> Layout:
        """Squares around things of native pictures, as many pixels as `batch` has."""
        choose = random.Random(str(seed))  # noqa: S311 - training data, no secret
        layout, _ = self.native(max(1, batch_size * self._data.size_px**2 // side**2), choose)
        return layout.cropped(side, choose)

    def _of_size(self, size: tuple[int, int], count: int, choose: random.Random) -> tuple[Layout, list[Description]]:
        pairs = round(count * _PAIR_SHARE)
        descriptions = [self._describe(choose, 2 if index < pairs else 1) for index in range(count)]
        return self.layout(descriptions, size, choose), descriptions

    def layout(self, descriptions: list[Description], size: tuple[int, int], choose: random.Random) -> Layout:
        """Pictures that fit; those of two things come first."""
        pictures = [
            lay_out(each, self._icons.icons, self._icons.extents, size, choose, self._describe.background)
            for each in descriptions
        ]
        return Layout.of(pictures, size)
