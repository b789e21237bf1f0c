"""Stage one: the autoencoder, and its decoder once more alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffuserve_training.config import Optimisation, Vae
from diffuserve_training.dataset import Icons, image_batch
from diffuserve_training.step_module import AveragedModule


class VaeModule(AveragedModule):
    """AutoencoderKL without its random posterior: the decoder sees the mean and a little noise, which keeps the latents
    smooth and is learned sooner than a sampled posterior with a divergence.

    The loss is L1 + squared error + `edge_weight` x L1 of the differences of neighbouring pixels + `latent_weight` x the
    mean squared latent.
    """

    def __init__(self, config: Vae, icons: Icons, optimisation: Optimisation, vae: Any) -> None:
        super().__init__(optimisation, vae)
        self.config = config
        self._icons = icons

    @classmethod
    def from_config(cls, config: Vae, icons: Icons) -> VaeModule:
        """Everything is learned, from random weights."""
        import diffusers

        library: Any = diffusers
        return cls(config, icons, config.optimisation, library.AutoencoderKL(**config.model))

    @classmethod
    def of_decoder(cls, config: Vae, icons: Icons, optimisation: Optimisation, vae: Any) -> VaeModule:
        """A trained autoencoder whose latents stay what they are, so that a UNet may be learning them meanwhile."""
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(False)
        return cls(config, icons, optimisation, vae)

    def training_step(self, images: Tensor, batch_index: int) -> Tensor:
        moments = self.network.encode(images).latent_dist
        latents = moments.mean
        noise = torch.randn(latents.shape, generator=self.generator()).to(latents)
        drawn = self.network.decode(latents + self.config.latent_noise * noise).sample
        pixels = functional.l1_loss(drawn, images) + functional.mse_loss(drawn, images)
        edges = sum(functional.l1_loss(drawn.diff(dim=dim), images.diff(dim=dim)) for dim in (2, 3))
        loss = pixels + self.config.edge_weight * edges + self.config.latent_weight * latents.square().mean()
        error = functional.mse_loss(drawn.detach().float().clamp(-1, 1), images)
        self.log_dict({"loss": loss, "psnr_db": 10 * torch.log10(4 / error)}, prog_bar=True)
        return loss

    def batch(self, step: int, seed: tuple[int, ...]) -> Tensor:
        batch_size, crop_px = self.optimisation.batch_size, self.config.crop_px
        if crop_px is not None and self.optimisation.is_cooling(step):  # as many pixels, now with an image's borders
            batch_size = max(1, batch_size * crop_px**2 // self._icons.drawn[0].shape[0] ** 2)
            crop_px = None
        return torch.from_numpy(image_batch(self._icons, seed=seed, batch_size=batch_size, crop_px=crop_px))
