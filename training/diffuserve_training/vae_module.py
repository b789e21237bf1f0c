"""Stage one: the autoencoder."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from diffuserve_training.averaging import average_of
from diffuserve_training.config import Optimisation, Vae
from diffuserve_training.dataset import Icons, Steps, image_batch
from diffuserve_training.optimisation import adamw, generator_for


class VaeModule(lightning.LightningModule):
    """AutoencoderKL without its random posterior: the decoder sees the mean and a little noise, which keeps the latents
    smooth and is learned sooner than a sampled posterior with a divergence.

    The loss is L1 + squared error + `edge_weight` x L1 of the differences of neighbouring pixels + `latent_weight` x the
    mean squared latent.
    """

    def __init__(self, config: Vae, icons: Icons) -> None:
        super().__init__()
        import diffusers

        self.config = config
        library: Any = diffusers
        self.vae = library.AutoencoderKL(**config.model)
        self.average = average_of(self.vae, config.optimisation.ema_decay)
        self._icons = icons

    @property
    def optimisation(self) -> Optimisation:
        return self.config.optimisation

    def training_step(self, images: Tensor, batch_index: int) -> Tensor:
        moments = self.vae.encode(images).latent_dist
        latents = moments.mean
        noise = torch.randn(latents.shape, generator=generator_for(self), device="cpu").to(latents)
        drawn = self.vae.decode(latents + self.config.latent_noise * noise).sample
        pixels = functional.l1_loss(drawn, images) + functional.mse_loss(drawn, images)
        edges = sum(functional.l1_loss(drawn.diff(dim=dim), images.diff(dim=dim)) for dim in (2, 3))
        loss = pixels + self.config.edge_weight * edges + self.config.latent_weight * latents.square().mean()
        error = functional.mse_loss(drawn.detach().float().clamp(-1, 1), images)
        self.log_dict({"loss": loss, "psnr_db": 10 * torch.log10(4 / error)}, prog_bar=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.average.update_parameters(self.vae)

    def configure_optimizers(self) -> Any:
        return adamw(self.vae.parameters(), self.optimisation)

    def train_dataloader(self) -> DataLoader[Any]:
        optimisation, rank = self.optimisation, self.global_rank

        def batch(step: int) -> Tensor:
            seed = (optimisation.seed, step, rank)
            images = image_batch(
                self._icons, seed=seed, batch_size=optimisation.batch_size, crop_px=self.config.crop_px
            )
            return torch.from_numpy(images)

        return DataLoader(Steps(batch, lambda: self.global_step), batch_size=None)
