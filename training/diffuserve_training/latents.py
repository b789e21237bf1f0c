"""What the trainings need to know of an autoencoder's latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffuserve_training.identity import weights_digest


def scaling_factor_of(vae: Any, images: Tensor) -> float:
    """One over the deviation of the latents of some images (Rombach et al., arXiv:2112.10752, section D.1)."""
    with torch.inference_mode():
        return 1 / float(vae.encode(images).latent_dist.mean.std())


def encoder_digest(vae: Any) -> bytes:
    """Of the weights that latents follow from, on the CPU."""
    return weights_digest(vae, only=("encoder.", "quant_conv."))
