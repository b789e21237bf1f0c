"""The VAE encoder, from 8-bit pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class VaeEncoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae: Any = vae
        self.scaling_factor = float(vae.config.scaling_factor)
        self.shift_factor = float(vae.config.shift_factor or 0)

    def forward(self, image: Tensor) -> Tensor:
        """`image`: (B, H, W, 3) uint8 RGB. Returns the posterior's mode, (B, C, h, w) float32, unit variance."""
        # Cast first: all that TensorRT does with bytes is to cast them.
        pixels = image.to(torch.float32).permute(0, 3, 1, 2) / 255 * 2 - 1
        mode = self.vae.encode(pixels).latent_dist.mode()
        return (mode - self.shift_factor) * self.scaling_factor
