"""Averaged weights, which draw better than those of any one step."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Average(nn.Module):
    """An exponential moving average of a module's weights, in `module`. The decay begins low and rises to `decay`, as in
    TensorFlow's ExponentialMovingAverage: min(decay, (1 + n) / (10 + n)) after n updates."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, count: int) -> None:
        """With the weights of a step, before which there were `count` updates."""
        share = 1 - min(self._decay, (1 + count) / (10 + count))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), share)
