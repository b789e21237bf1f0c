"""A rough image of a latent, without the VAE."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diffuserve.bundle.manifest import Preview
from diffuserve.stages import Float32


def preview_from_latents(latents: Float32, preview: Preview) -> NDArray[np.uint8]:
    """A rough image of one pixel a latent pixel, by the bundle's linear map.

    Args:
        latents: (C, h, w) float32, unit variance: the sampler's current estimate of the finished latents.

    Returns:
        (h, w, 3) uint8, RGB.
    """
    rgb = np.tensordot(latents, np.asarray(preview.matrix, np.float32), axes=(0, 0)) + np.asarray(
        preview.bias, np.float32
    )
    pixels: NDArray[np.uint8] = (rgb.clip(0.0, 1.0) * 255.0).round().astype(np.uint8)
    return pixels
