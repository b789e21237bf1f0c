"""A linear map from latents to RGB: previews of a running request without a VAE decode."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from diffuserve.bundle.manifest import ModelSpec, Preview
from diffuserve.tensors import VAE_ENCODER
from diffuserve_export.graphs.finite_values import not_finite
from diffuserve_export.sizes import native_units

if TYPE_CHECKING:
    from torch import nn

_IMAGES = 8
_IMAGES_PER_CALL = 4
_SHAPES_PER_IMAGE = 4


def preview_from_vae_encoder(vae_encoder: nn.Module, spec: ModelSpec) -> Preview:
    """Fits the map by least squares on synthetic images: each latent pixel against the mean colour of its image pixels.

    Args:
        vae_encoder: the module of the stage vae_encoder.
        spec: the model's; images have its native size, or a smaller one where that is large.

    Raises:
        CheckpointError: the encoder makes values that are not finite.
    """
    import torch

    factor = spec.vae_scale_factor
    height, width = (units * spec.size_multiple for units in native_units(spec))
    rng = np.random.default_rng(0)
    latents, colours = [], []
    for _ in range(_IMAGES // _IMAGES_PER_CALL):
        images = np.stack([_synthetic_image(rng, height, width) for _ in range(_IMAGES_PER_CALL)])
        with torch.inference_mode():
            encoded = vae_encoder(torch.from_numpy(images)).numpy()
        if not np.isfinite(encoded).all():
            raise not_finite(f"{VAE_ENCODER} of {spec.name}", {VAE_ENCODER: vae_encoder})
        latents.append(encoded.transpose(0, 2, 3, 1).reshape(-1, spec.latent_channels))
        blocks = images.reshape(len(images), height // factor, factor, width // factor, factor, 3)
        colours.append(blocks.mean(axis=(2, 4)).reshape(-1, 3) / 255)
    x = np.concatenate(latents).astype(np.float64)
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    y = np.concatenate(colours)
    solution = np.linalg.lstsq(x, y, rcond=None)[0]
    red_green_blue = [(float(r), float(g), float(b)) for r, g, b in solution]
    rmse = float(np.sqrt(np.mean((x @ solution - y) ** 2)))
    return Preview(matrix=tuple(red_green_blue[:-1]), bias=red_green_blue[-1], rmse=rmse)


def _synthetic_image(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Discs and rectangles on a gradient, in random colours. Returns (height, width, 3) uint8."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    angle = rng.uniform(0, 2 * np.pi)
    ramp = ((x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle) + 0.5).clip(0, 1)[..., np.newaxis]
    image = (1 - ramp) * rng.uniform(0, 1, 3) + ramp * rng.uniform(0, 1, 3)
    for _ in range(_SHAPES_PER_IMAGE):
        centre_x, centre_y, half_width, half_height = *rng.uniform(0, 1, 2), *rng.uniform(0.05, 0.35, 2)
        if rng.random() < 0.5:
            inside = (x - centre_x) ** 2 + (y - centre_y) ** 2 < half_width**2
        else:
            inside = (abs(x - centre_x) < half_width) & (abs(y - centre_y) < half_height)
        image[inside] = rng.uniform(0, 1, 3)
    return (image * 255).round().astype(np.uint8)
