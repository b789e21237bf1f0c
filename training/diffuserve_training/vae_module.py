"""Stage one: the autoencoder, and its decoder once more alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffuserve_training.compose import Layout, compose
from diffuserve_training.config import Optimisation, Vae
from diffuserve_training.dataset import Icons, Pictures
from diffuserve_training.step_module import AveragedModule


def new_vae(config: Vae) -> Any:
    """Of random weights, all of which are learned."""
    import diffusers

    library: Any = diffusers
    return library.AutoencoderKL(**config.model)


def with_fixed_latents(vae: Any) -> Any:
    """A trained autoencoder whose latents stay what they are, so that a UNet may be learning them meanwhile."""
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    return vae


class VaeModule(AveragedModule):
    """AutoencoderKL without its random posterior: the decoder sees the mean and a little noise, which keeps the latents
    smooth and is learned sooner than a sampled posterior with a divergence.

    The loss is L1 + squared error + `edge_weight` x L1 of the differences of neighbouring pixels + `latent_weight` x the
    mean squared latent.
    """

    def __init__(
        self,
        config: Vae,
        icons: Icons,
        pictures: Pictures,
        optimisation: Optimisation,
        vae: Any,
        seconds: float | None = None,
    ) -> None:
        super().__init__(optimisation, vae, seconds)
        self.config = config
        self._pictures = pictures
        self._atlas = icons.atlas

    def on_fit_start(self) -> None:
        self._atlas = self._atlas.to(self.device)

    def training_step(self, layout: Layout, batch_index: int) -> Tensor:
        images = compose(self._atlas, layout)
        moments = self.network.encode(images).latent_dist
        latents = moments.mean
        noise = torch.randn(latents.shape, generator=self.generator(self.device), device=self.device).to(latents)
        drawn = self.network.decode(latents + self.config.latent_noise * noise).sample.float()
        pixels = functional.l1_loss(drawn, images) + functional.mse_loss(drawn, images)
        edges = sum(functional.l1_loss(drawn.diff(dim=dim), images.diff(dim=dim)) for dim in (2, 3))
        loss = pixels + self.config.edge_weight * edges + self.config.latent_weight * latents.float().square().mean()
        error = functional.mse_loss(drawn.detach().clamp(-1, 1), images)
        self.log_dict({"loss": loss, "psnr_db": 10 * torch.log10(4 / error)}, prog_bar=True)
        return loss

    def batch(self, step: int, seed: tuple[int, ...]) -> Layout:
        batch_size, crop_px = self.optimisation.batch_size, self.config.crop_px
        if crop_px is None or self.progress.is_cooling(step):
            return self._pictures.batch(seed, batch_size)[0]
        return self._pictures.crops(seed, batch_size, crop_px)
