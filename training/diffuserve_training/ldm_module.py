"""Stage two: text encoder and UNet together, predicting v (Salimans and Ho, arXiv:2202.00512)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffuserve_training.captions import caption
from diffuserve_training.compose import Layout, compose
from diffuserve_training.config import Ldm
from diffuserve_training.dataset import Icons, Pictures
from diffuserve_training.step_module import AveragedModule


class Denoiser(nn.Module):
    """The two networks that are trained together, in one module, so that one average keeps both."""

    def __init__(self, text_encoder: Any, unet: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    @classmethod
    def from_config(cls, config: Ldm, tokenizer: Any) -> Denoiser:
        """Of random weights."""
        import diffusers
        from transformers import CLIPTextConfig, CLIPTextModel

        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=config.tokens,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **config.text_encoder,
        )
        library: Any = diffusers
        return cls(
            CLIPTextModel(text), library.UNet2DConditionModel(**config.unet, cross_attention_dim=text.hidden_size)
        )

    def forward(self, noisy: Tensor, timesteps: Tensor, input_ids: Tensor) -> Tensor:
        """v for (batch x k) noisy latents of (batch) captions, those of one caption standing together."""
        hidden = self.text_encoder(input_ids)[0]
        hidden = hidden.repeat_interleave(len(noisy) // len(input_ids), dim=0)
        predicted: Tensor = self.unet(noisy, timesteps, hidden).sample
        return predicted


class LdmModule(AveragedModule):
    """The loss is the squared error of v, uniformly or by min-SNR weighting (Hang et al., arXiv:2303.09556, which for v is
    min(SNR, gamma) / (SNR + 1))."""

    def __init__(
        self,
        config: Ldm,
        icons: Icons,
        pictures: Pictures,
        vae: Any,
        tokenizer: Any,
        denoiser: Denoiser,
        seconds: float | None = None,
    ) -> None:
        super().__init__(config.optimisation, denoiser, seconds)
        from diffusers import DDIMScheduler

        self.config = config
        self.tokenizer = tokenizer
        self.scheduler: Any = DDIMScheduler(**config.scheduler)
        self._icons, self._pictures = icons.icons, pictures
        # No part of what is trained and kept.
        self._atlas, self._encoder = icons.atlas, [copy.deepcopy(vae).requires_grad_(False)]

    def on_fit_start(self) -> None:
        self._atlas = self._atlas.to(self.device)
        # The autoencoder's weights fit into half precision, which a GPU is twice as fast in.
        self._encoder[0].to(self.device, torch.float16 if self.device.type == "cuda" else torch.float32)

    def training_step(self, batch: tuple[Layout, Tensor], batch_index: int) -> Tensor:
        layout, input_ids = batch
        levels = self.config.noise_levels
        latents = self._latents(layout).repeat_interleave(levels, dim=0)
        noise = torch.randn(latents.shape, generator=self.generator(self.device), device=self.device)
        timesteps = self._timesteps(len(latents), self.generator()).to(self.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = self.scheduler.get_velocity(latents, noise, timesteps)
        predicted = self.network(noisy, timesteps, input_ids)
        error = functional.mse_loss(predicted.float(), target, reduction="none").mean(dim=(1, 2, 3))
        self.log("error", error.detach().mean(), prog_bar=True)
        return (error * self._weights(timesteps)).mean()

    @torch.no_grad()
    def _latents(self, layout: Layout) -> Tensor:
        """(batch, C, h, w) float32, scaled to unit variance."""
        [vae] = self._encoder
        images = compose(self._atlas, layout)
        if vae.dtype == torch.float32:
            latents = vae.encode(images).latent_dist.mean
        else:
            with torch.autocast(self.device.type, enabled=False):
                latents = vae.encode(images.to(vae.dtype)).latent_dist.mean
        scaled: Tensor = latents.float() * vae.config.scaling_factor
        return scaled

    def _timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Uniform, one in each of `count` equal parts, which makes the loss less noisy (Kingma et al., arXiv:2107.00630,
        section I.1); in random order, so that each image meets all levels."""
        total = self.scheduler.config.num_train_timesteps
        parts = torch.arange(count, dtype=torch.float64) + torch.rand(count, generator=generator, dtype=torch.float64)
        timesteps = (parts * total / count).long().clamp(max=total - 1)
        return timesteps[torch.randperm(count, generator=generator)]

    def _weights(self, timesteps: Tensor) -> Tensor:
        gamma = self.config.min_snr_gamma
        if gamma is None:
            return torch.ones((), device=timesteps.device)
        signal = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        snr = signal / (1 - signal)
        return snr.clamp(max=gamma) / (snr + 1)

    def batch(self, step: int, seed: tuple[int, ...]) -> tuple[Layout, Tensor]:
        layout, descriptions, choose = self._pictures.batch(seed, self.optimisation.batch_size)
        captions = [
            "" if choose.random() < self.config.empty_captions else caption(each, self._icons, choose)
            for each in descriptions
        ]
        return layout, self.input_ids(captions)

    def input_ids(self, captions: list[str]) -> Tensor:
        """(batch, tokens) int64."""
        encoded = self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=self.config.tokens, return_tensors="pt"
        )
        input_ids: Tensor = encoded.input_ids
        return input_ids
