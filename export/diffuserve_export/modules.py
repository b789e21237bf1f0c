"""The modules that are exported: Stable Diffusion's parts with exactly the tensors of `diffuserve.tensors`.

What StableDiffusionPipeline does around its models is inside: scaling of latents, clamping, rounding, layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffuserve.tensors import TEXT_ENCODER, UNET, VAE_DECODER, VAE_ENCODER
from diffuserve_export.load import LoadedModel


class TextEncoder(nn.Module):
    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        """`input_ids`: (B, L) int32. Returns the last hidden state, (B, L, D) float32."""
        return self.text_encoder(input_ids).last_hidden_state


class Unet(nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """`sample`: (B, C, h, w) float32; `timestep`: (B, 1) float32 in 0..T-1, each row its own, a vector of one since
        Triton has no batched scalar; `encoder_hidden_states`: (B, N, D) float32. Returns (B, C, h, w) float32."""
        return self.unet(sample, timestep.squeeze(1), encoder_hidden_states, return_dict=False)[0]


class VaeDecoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae: Any = vae
        self.scaling_factor = float(vae.config.scaling_factor)
        self.shift_factor = float(vae.config.shift_factor or 0)

    def forward(self, latent_sample: Tensor) -> Tensor:
        """`latent_sample`: (B, C, h, w) float32, unit variance. Returns RGB images, (B, H, W, 3) uint8."""
        decoded = self.vae.decode(latent_sample / self.scaling_factor + self.shift_factor, return_dict=False)[0]
        levels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round()  # half to even, as numpy rounds
        return levels.permute(0, 2, 3, 1).to(torch.uint8)


class VaeEncoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae: Any = vae
        self.scaling_factor = float(vae.config.scaling_factor)
        self.shift_factor = float(vae.config.shift_factor or 0)

    def forward(self, image: Tensor) -> Tensor:
        """`image`: (B, H, W, 3) uint8 RGB. Returns the posterior's mode, (B, C, h, w) float32, unit variance."""
        pixels = image.permute(0, 3, 1, 2).to(torch.float32) / 255 * 2 - 1
        mode = self.vae.encode(pixels).latent_dist.mode()
        return (mode - self.shift_factor) * self.scaling_factor


def modules_from_model(model: LoadedModel) -> dict[str, nn.Module]:
    """The module of each stage, by name; they share the model's weights."""
    modules = {
        TEXT_ENCODER: TextEncoder(model.text_encoder),
        UNET: Unet(model.unet),
        VAE_DECODER: VaeDecoder(model.vae),
        VAE_ENCODER: VaeEncoder(model.vae),
    }
    return {stage: module.eval().requires_grad_(False) for stage, module in modules.items()}
