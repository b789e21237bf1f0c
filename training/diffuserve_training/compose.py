"""Pictures drawn from their layout, many at once, by PyTorch on any device."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from diffuserve_training.layout import Picture

SPRITE_PX, MARGIN_PX = 160, 4
"""Side of an icon's largest drawing, and what is free on each side of it; two halvings leave one free pixel."""
_LEVELS = 3
_SHADOW_SIGMA, _SHADOW_DOWN, _SHADOW_RIGHT = 0.035, 0.045, 0.015  # of the picture's shorter side


def atlas_of(drawn: NDArray[np.uint8]) -> Tensor:
    """Every icon at three sizes, each half of the last: the largest on the left, the others below each other beside it.

    Args:
        drawn: (N, 160, 160, 4) uint8, alpha not premultiplied.

    Returns:
        (N, 4, 160, 240) uint8, premultiplied.
    """
    atlas = torch.zeros(len(drawn), 4, SPRITE_PX, SPRITE_PX * 3 // 2, dtype=torch.uint8)
    for start in range(0, len(drawn), 64):
        level = torch.from_numpy(drawn[start : start + 64]).permute(0, 3, 1, 2).float()
        level[:, :3] *= level[:, 3:] / 255
        top, side = 0, SPRITE_PX
        atlas[start : start + 64, :, :, :SPRITE_PX] = level.round().to(torch.uint8)
        for _ in range(1, _LEVELS):
            level, side = functional.avg_pool2d(level, 2), side // 2
            atlas[start : start + 64, :, top : top + side, SPRITE_PX : SPRITE_PX + side] = level.round().to(torch.uint8)
            top += side
    return atlas


def smallest(atlas: Tensor) -> Tensor:
    """The smallest drawings of an atlas: (N, 4, 40, 40) uint8."""
    side = SPRITE_PX // 4
    return atlas[:, :, SPRITE_PX // 2 : SPRITE_PX // 2 + side, SPRITE_PX : SPRITE_PX + side]


@dataclass(frozen=True)
class Layout:
    """Pictures of one size as arrays, those of two things first.

    Attributes:
        size: width and height in pixels.
        icon: (T,) int64: the first thing of each of the B pictures, then the second of each that has one.
        things: (T, 6) float32: x, y, size_px, cosine and sine of the turn, -1 where mirrored and else 1.
        colours: (B, 2, 3) float32, 0 .. 1.
        ramp: (B, 4) float32, as `Picture` has it.
        shadow: (B,) float32.
    """

    size: tuple[int, int]
    icon: Tensor
    things: Tensor
    colours: Tensor
    ramp: Tensor
    shadow: Tensor

    @classmethod
    def of(cls, pictures: Sequence[Picture], size: tuple[int, int]) -> Layout:
        """Raises `ValueError`: a picture of two things comes behind one of one."""
        counts = [len(picture.things) for picture in pictures]
        if counts != sorted(counts, reverse=True):
            raise ValueError("pictures of two things come first")
        things = [picture.things[0] for picture in pictures]
        things += [picture.things[1] for picture in pictures if len(picture.things) == 2]
        rows = [
            (each.x, each.y, each.size_px, math.cos(each.turn), math.sin(each.turn), -1 if each.mirrored else 1)
            for each in things
        ]
        return cls(
            size,
            torch.tensor([each.icon for each in things]),
            torch.tensor(rows, dtype=torch.float32),
            torch.tensor([picture.colours for picture in pictures], dtype=torch.float32) / 255,
            torch.tensor([picture.ramp for picture in pictures], dtype=torch.float32),
            torch.tensor([picture.shadow for picture in pictures], dtype=torch.float32),
        )

    def cropped(self, side: int, choose: random.Random) -> Layout:
        """A square of each picture, in which the first thing's centre is."""
        width, height = self.size
        things, ramp, count = self.things.clone(), self.ramp.clone(), len(self.shadow)
        second = len(things) - count
        corners = []
        for x, y in things[:count, :2].tolist():
            left = min(max(x - side * choose.uniform(0.2, 0.8), 0.0), width - side)
            top = min(max(y - side * choose.uniform(0.2, 0.8), 0.0), height - side)
            corners.append((float(int(left)), float(int(top))))
        corner = torch.tensor(corners)
        things[:count, :2] -= corner
        things[count:, :2] -= corner[:second]
        moved = corner + side / 2 - torch.tensor([width / 2, height / 2])  # of the centre, from which a ramp counts
        ramp[:, 2] -= (ramp[:, :2] * moved).sum(dim=1)
        return Layout((side, side), self.icon, things, self.colours, ramp, self.shadow)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.icon, self.things, self.colours, self.ramp, self.shadow

    def to(self, device: torch.device | str) -> Layout:
        return Layout(self.size, *(each.to(device, non_blocking=True) for each in self.tensors()))


@torch.no_grad()
def compose(atlas: Tensor, layout: Layout) -> Tensor:
    """Draws what is laid out.

    Args:
        atlas: from `atlas_of`, on the layout's device.
        layout: B pictures.

    Returns:
        (B, 3, H, W) float32 in -1 .. 1.
    """
    with torch.autocast(atlas.device.type, enabled=False):
        return _compose(atlas, layout)


def pixels_of(images: Tensor) -> NDArray[np.uint8]:
    """(B, 3, H, W) in -1 .. 1, as `compose` gives them, as (B, H, W, 3) uint8."""
    return ((images.permute(0, 2, 3, 1).cpu().numpy() + 1) * 127.5).round().astype(np.uint8)


def _compose(atlas: Tensor, layout: Layout) -> Tensor:
    count = len(layout.shadow)
    second = len(layout.icon) - count
    sprites = _sprites(atlas, layout)
    picture = _backgrounds(layout)
    alpha = sprites[:count, 3:].clone()
    alpha[:second] = torch.maximum(alpha[:second], sprites[count:, 3:])
    picture *= 1 - layout.shadow[:, None, None, None] * _shadows(alpha, min(layout.size))
    picture = sprites[:count, :3] + picture * (1 - sprites[:count, 3:])
    picture[:second] = sprites[count:, :3] + picture[:second] * (1 - sprites[count:, 3:])
    return picture.clamp_(0, 1) * 2 - 1


def _sprites(atlas: Tensor, layout: Layout) -> Tensor:
    """(T, 4, H, W) in 0 .. 1, premultiplied: four samples a pixel, of the drawing that is less than twice as large."""
    width, height = layout.size
    x, y, size_px, cosine, sine, mirror = layout.things[:, :, None, None].unbind(1)
    across = (torch.arange(2 * width, device=atlas.device) + 0.5) / 2
    down = (torch.arange(2 * height, device=atlas.device) + 0.5) / 2
    dx, dy = across[None, None, :] - x, down[None, :, None] - y
    side = SPRITE_PX - 2 * MARGIN_PX
    level = (side / size_px).log2().floor().clamp(0, _LEVELS - 1)
    limit = 0.5 + MARGIN_PX / side / 2  # in the free margin
    u = ((cosine * dx + sine * dy) * mirror / size_px).clamp(-limit, limit)
    v = ((cosine * dy - sine * dx) / size_px).clamp(-limit, limit)
    scale = 0.5**level
    left = torch.where(level > 0, float(SPRITE_PX), 0.0)
    top = torch.where(level > 1, SPRITE_PX / 2, 0.0)
    texel_x = left + scale * (SPRITE_PX / 2 + side * u)
    texel_y = top + scale * (SPRITE_PX / 2 + side * v)
    grid = torch.stack([texel_x / (SPRITE_PX * 3 // 2), texel_y / SPRITE_PX], dim=-1) * 2 - 1
    drawings = atlas[layout.icon].float() / 255
    return functional.avg_pool2d(functional.grid_sample(drawings, grid, align_corners=False), 2)


def _backgrounds(layout: Layout) -> Tensor:
    width, height = layout.size
    x, y, offset, softness = layout.ramp[:, :, None, None].unbind(1)
    device = layout.ramp.device
    across = (torch.arange(width, device=device) + 0.5 - width / 2)[None, None, :]
    down = (torch.arange(height, device=device) + 0.5 - height / 2)[None, :, None]
    share = ((x * across + y * down - offset) / softness + 0.5).clamp(0, 1)[:, None]
    return torch.lerp(layout.colours[:, 0, :, None, None], layout.colours[:, 1, :, None, None], share)


def _shadows(alpha: Tensor, side: int) -> Tensor:
    """The things' outlines, moved and blurred."""
    sigma = _SHADOW_SIGMA * side
    reach = math.ceil(2 * sigma)
    kernel = torch.arange(-reach, reach + 1, device=alpha.device, dtype=alpha.dtype)
    kernel = torch.exp(-kernel.square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    down, right = round(_SHADOW_DOWN * side), round(_SHADOW_RIGHT * side)
    moved = functional.pad(alpha, (right, 0, down, 0))[..., : alpha.shape[2], : alpha.shape[3]]
    blurred = functional.conv2d(moved, kernel[None, None, None, :], padding=(0, reach))
    return functional.conv2d(blurred, kernel[None, None, :, None], padding=(reach, 0))
