"""What a LoRA makes of one layer's weight: W + factor * B A, for convolutions too, with Tucker's middle and with DoRA.

Everything is computed in float64 and rounded once, to the weight's own dtype, when all LoRAs have changed it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Difference:
    """W + scale * difference.

    `difference`: float64, of the weight's shape but for dimensions of 1; `bias`: whether W is the layer's bias.
    """

    difference: Tensor
    scale: float
    bias: bool

    def misfit(self, shape: Shape) -> str:
        """Why it does not fit a weight of that shape; empty if it does."""
        if _without_ones(self.difference.shape) == _without_ones(shape):
            return ""
        return f"its difference is of the shape {tuple(self.difference.shape)}, and the model's is {shape}"

    def apply(self, weight: Tensor) -> Tensor:
        """The weight with the change; float64 both."""
        return weight + self.scale * self.difference.reshape(weight.shape)


@dataclass(frozen=True)
class LowRank:
    """W + scale * factor * B A, or with DoRA (arXiv:2402.09353) W + scale * (m (W + factor * B A) / |W + factor * B A| - W).

    Attributes:
        down: A, (rank, in, height, width), or (rank, in) for a linear layer; (rank, in, 1, 1) with a middle.
        up: B, (out, rank), or with two dimensions of 1 behind it.
        mid: (rank, rank, height, width) or None: Tucker's form, sum over n and m of B[o, n] mid[n, m] A[m, i].
        factor: alpha / rank.
        scale: what the user wants of it, 1 as it was trained.
        magnitude: m, (n,), one for each of the weight's rows along `axis`; or None, without DoRA.
        axis: 0 if the norms are over the weights of each output, 1 if over those of each input; LyCORIS has both.
    The tensors are float64.
    """

    down: Tensor
    up: Tensor
    mid: Tensor | None
    factor: float
    scale: float
    magnitude: Tensor | None = None
    axis: int = 0
    bias: bool = False

    def misfit(self, shape: Shape) -> str:
        """Why it does not fit a weight of that shape; empty if it does."""
        if len(shape) not in (2, 4):
            return f"the model's layer has a weight of the shape {shape}, which is neither linear nor a convolution"
        down, up = self.down.flatten(1), self.up.flatten(1)
        inputs = shape[1] if self.mid is not None else math.prod(shape[1:])
        if up.shape[0] != shape[0] or down.shape[1] != inputs:
            ours, theirs = f"{shape[1]} to {shape[0]}", f"{self.down.shape[1]} to {self.up.shape[0]}"
            if ours != theirs:
                return f"its layer leads from {theirs} numbers, and the model's from {ours}"
            return f"its layer is {_kind(tuple(self.down.shape))}, and the model's is {_kind(shape)}"
        ranks = up.shape[1], down.shape[0]
        if self.mid is None and ranks[0] != ranks[1]:
            return f"lora_up is for a rank of {ranks[0]}, and lora_down of {ranks[1]}"
        if self.mid is not None and len(shape) != 4:
            return "it has lora_mid, and the model's layer is linear"
        if self.mid is not None and tuple(self.mid.shape) != (*ranks, *shape[2:]):
            return f"lora_mid is of the shape {tuple(self.mid.shape)}, where {(*ranks, *shape[2:])} was expected"
        if self.magnitude is not None and len(self.magnitude) != shape[self.axis]:
            return f"it has {len(self.magnitude)} DoRA magnitudes, where {shape[self.axis]} were expected"
        return ""

    def apply(self, weight: Tensor) -> Tensor:
        """The weight with the change; float64 both."""
        change = self.factor * self._product(weight)
        if self.magnitude is not None:
            change = self._decomposed(weight + change, self.magnitude) - weight
        return weight + self.scale * change

    def _decomposed(self, weight: Tensor, magnitude: Tensor) -> Tensor:
        """Each row with its magnitude in place of its norm; one of zeros stays so."""
        rows = weight.movedim(self.axis, 0)
        norms = rows.flatten(1).norm(dim=1)
        factors = (magnitude / norms).where(norms > 0, 0.0)
        return (rows * factors.reshape(-1, *[1] * (rows.ndim - 1))).movedim(0, self.axis)

    def _product(self, weight: Tensor) -> Tensor:
        down, up = self.down.flatten(1), self.up.flatten(1)
        if self.mid is None:
            return (up @ down).reshape(weight.shape)
        import torch

        return torch.einsum("on,nmhw,mi->oihw", up, self.mid, down)


Change = Difference | LowRank


def _kind(shape: Shape) -> str:
    return f"a convolution of {' x '.join(map(str, shape[2:]))}" if shape[2:] else "linear"


def _without_ones(shape: Shape) -> Shape:
    return tuple(size for size in shape if size != 1)
