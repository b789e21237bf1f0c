"""Which icon is seen in a part of a picture: the measure of whether a model draws what it was asked for."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from diffuserve_training.compose import MARGIN_PX, SPRITE_PX, smallest
from diffuserve_training.dataset import Icons
from diffuserve_training.segment import Box, Ground

_SMALL, _LARGE = 20, 32
_FILLS = 0.8  # of the compared square, by the longer side of a box
_TURNS = (0.0, -12.0, 12.0, -24.0, 24.0, -36.0, 36.0, 180.0)
_EDGE_WEIGHT = 5.0
# The rounds of the close look: how many are looked at, and how far turn (degrees), size and place are tried around them.
_ROUNDS = ((24, 6.0, 0.1, 0.08), (8, 4.0, 0.05, 0.04), (3, 2.0, 0.025, 0.02))
_TRIES = [
    (turn, size, *place)
    for turn, size, place in itertools.product((-1, 0, 1), (-1, 0, 1), ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)))
]


@dataclass(frozen=True)
class Seen:
    """The nearest icon.

    Attributes:
        icon: index.
        turn: in degrees clockwise.
        mirrored: as it is nearest; of no meaning for what is the same on both sides.
        distance: how unlike it is, 0 .. 2.
    """

    icon: int
    turn: float
    mirrored: bool
    distance: float


class Gallery:
    """Every icon in eight turns and both ways, each as large as its box allows.

    A part of a picture is compared with all at 20 x 20, as what differs from the picture's background. The nearest are then
    drawn at 32 x 32, a little turned, larger, smaller and moved. There the edges, which have about a tenth
    of the pixels' variance, count five times, so that outlines count about as much as areas.
    """

    def __init__(self, icons: Icons) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._sprites = smallest(icons.atlas).to(device).float() / 255
        count, kinds = len(icons.icons), torch.tensor([(turn, mirror) for turn in _TURNS for mirror in (1.0, -1.0)])
        # (N, 16, 5): turn, mirror, size of the drawing and place of its middle, in units of its box's longer side.
        views = torch.cat([kinds, torch.tensor([[1.0, 0.0, 0.0]]).repeat(len(kinds), 1)], dim=1)
        self._views = self._fitted(views.repeat(count, 1, 1))
        self._small = self._drawn(torch.arange(count), self._views, _SMALL).flatten(2)  # (N x 16, 4, 400)

    @torch.inference_mode()
    def find(self, image: NDArray[np.uint8], ground: Ground, box: Box) -> Seen:
        """What is in a box of an (H, W, 3) image."""
        both = torch.from_numpy(np.concatenate([image.astype(np.float32), ground.image], axis=2) / 255).permute(2, 0, 1)
        device = self._sprites.device
        distance = self._roughly(_part(both, box, _SMALL).to(device)).cpu()
        part = _part(both, box, _LARGE).to(device)
        seen = _with_edges((part[:3] - part[3:])[None])[0]
        icon = torch.arange(len(self._views)).repeat_interleave(self._views.shape[1])
        views = self._views.flatten(0, 1)
        for count, turn, size, place in _ROUNDS:
            nearest = _distinct(distance, icon, views, count)
            around = torch.tensor(_TRIES) * torch.tensor([turn, size, place, place])
            tried = views[nearest, None].repeat(1, len(around), 1)
            tried[..., 0] += around[:, 0]
            tried[..., 2] *= 1 + around[:, 1]
            tried[..., 3:] += around[:, 2:]
            drawn = self._drawn(icon[nearest], tried, _LARGE)
            distance = _unlike(_with_edges(drawn[:, :3] - part[3:] * drawn[:, 3:]), seen).cpu()
            icon, views = icon[nearest].repeat_interleave(len(around)), tried.flatten(0, 1)
        best = int(distance.argmin())
        return Seen(int(icon[best]), float(views[best, 0]), bool(views[best, 1] < 0), float(distance[best]))

    def _roughly(self, part: Tensor) -> Tensor:
        """(N,): how unlike everything it is, on a background that is even here."""
        ground = part[3:].mean(dim=(1, 2))
        seen = (part[:3] - part[3:]).flatten()
        expected = self._small[:, :3] - ground[:, None] * self._small[:, 3:]
        return _unlike(expected.flatten(1), seen)

    def _drawn(self, icon: Tensor, views: Tensor, side: int) -> Tensor:
        """(N x k, 4, side, side) in 0 .. 1, premultiplied, of k views each."""
        turn, mirror, size, x, y = (each[..., None, None] for each in views.to(self._sprites.device).unbind(-1))
        turn = turn.deg2rad()
        along = (torch.arange(side, device=turn.device) + 0.5) / side / _FILLS - 0.5 / _FILLS
        dx, dy = along[None, :] - x, along[:, None] - y
        drawing = (
            SPRITE_PX / (SPRITE_PX - 2 * MARGIN_PX) / 2
        )  # half of the sprite, in units of the drawing's longer side
        u = (turn.cos() * dx + turn.sin() * dy) * mirror / size / drawing
        v = (turn.cos() * dy - turn.sin() * dx) / size / drawing
        grid = torch.stack([u, v], dim=-1).flatten(1, 2)  # a sprite's views below each other
        drawn = functional.grid_sample(self._sprites[icon.to(turn.device)], grid, align_corners=False)
        return drawn.unflatten(2, (-1, side)).transpose(1, 2).flatten(0, 1)

    def _fitted(self, views: Tensor) -> Tensor:
        """Views of size 1 in the middle, so changed that their boxes are."""
        side = 2 * _LARGE
        changed = []
        for start in range(0, len(views), 32):
            some = views[start : start + 32].clone()
            seen = self._drawn(torch.arange(start, start + len(some)), some, side)[:, 3].cpu() > 0.35
            bounds = []
            for flat in (seen.any(dim=1), seen.any(dim=2)):
                first = flat.float().argmax(dim=1)
                bounds.append((first, side - flat.flip(1).float().argmax(dim=1)))
            (left, right), (top, bottom) = bounds
            longer = torch.maximum(right - left, bottom - top)
            fitted = torch.stack(
                [
                    _FILLS * side / longer,
                    (side / 2 - (left + right) / 2) / longer,
                    (side / 2 - (top + bottom) / 2) / longer,
                ],
                dim=1,
            )
            changed.append(torch.cat([some[..., :2], fitted.view(len(some), -1, 3)], dim=-1))
        return torch.cat(changed)


def _unlike(one: Tensor, other: Tensor) -> Tensor:
    """Of (N, F) and (F,), (N,): one less the cosine, which does not prefer what is faint where a picture is blurred."""
    return 1 - one @ other / (one.norm(dim=1) * other.norm()).clamp_min(1e-6)


def _with_edges(difference: Tensor) -> Tensor:
    """(N, F) of (N, 3, H, W)."""
    edges = [_EDGE_WEIGHT**0.5 * difference.diff(dim=dim).flatten(1) for dim in (2, 3)]
    return torch.cat([difference.flatten(1), *edges], dim=1)


def _distinct(distance: Tensor, icon: Tensor, views: Tensor, count: int) -> Tensor:
    """The nearest of each icon and side, the nearest `count` of these."""
    chosen: dict[tuple[int, bool], int] = {}
    for index in distance.argsort()[: 12 * count].tolist():
        chosen.setdefault((int(icon[index]), bool(views[index, 1] < 0)), index)
        if len(chosen) == count:
            break
    return torch.tensor(list(chosen.values()))


def _part(both: Tensor, box: Box, side: int) -> Tensor:
    """(C, side, side): the square whose side is the box's longer one over `_FILLS`; beyond the edges goes on what is there."""
    height, width = both.shape[1:]
    square = max(box.width, box.height) / _FILLS
    x, y = box.centre
    theta = torch.tensor([[[square / width, 0, 2 * x / width - 1], [0, square / height, 2 * y / height - 1]]])
    grid = functional.affine_grid(theta, [1, len(both), 4 * side, 4 * side], align_corners=False)
    sampled = functional.grid_sample(both[None], grid, padding_mode="border", align_corners=False)
    return functional.avg_pool2d(sampled, 4)[0]
