"""The VAE decoder: scaling, clamping and rounding to 8 bits are in the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class VaeDecoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae: Any = vae
        self.scaling_factor = float(vae.config.scaling_factor)
        self.shift_factor = float(vae.config.shift_factor or 0)

    def forward(self, latent_sample: Tensor) -> tuple[Tensor, Tensor]:
        """`latent_sample`: (B, C, h, w) float32, unit variance. Returns RGB images, (B, H, W, 3) uint8, and whether all that
        each was rounded from is finite, (B, 1) bool."""
        decoded = self.vae.decode(latent_sample / self.scaling_factor + self.shift_factor, return_dict=False)[0]
        levels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round()  # half to even, as numpy rounds
        # The least of zeros and ones, which no precision and no order of computing changes; a sum might overflow.
        finite = torch.isfinite(decoded).to(decoded.dtype).amin(dim=(1, 2, 3)).to(torch.bool)
        return levels.permute(0, 2, 3, 1).to(torch.uint8), finite.unsqueeze(1)
