"""Averaged weights, which draw better than those of any one step."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def average_of(module: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of a module's weights. The decay begins low and rises to `decay`, as in
    TensorFlow's ExponentialMovingAverage: min(decay, (1 + n) / (10 + n)) after n updates."""

    def average(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        rising = (1 + int(count)) / (10 + int(count))
        return averaged.lerp(current, 1 - min(decay, rising))

    averaged = AveragedModel(module, avg_fn=average)
    averaged.requires_grad_(False)
    return averaged
