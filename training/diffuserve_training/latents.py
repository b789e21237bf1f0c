"""The latents of every icon on every background, computed once for each autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from diffuserve_training.backgrounds import COLOURS, lay_on
from diffuserve_training.dataset import Icons, to_unit
from diffuserve_training.identity import weights_digest


def scaling_factor_of(vae: Any, images: NDArray[np.float32]) -> float:
    """One over the deviation of the latents of some images (Rombach et al., arXiv:2112.10752, section D.1)."""
    with torch.inference_mode():
        return 1 / float(vae.encode(torch.from_numpy(images)).latent_dist.mean.std())


def latents_digest(vae: Any, icons: Icons) -> bytes:
    """Of what the latents follow from: the drawings and the encoder's weights."""
    return weights_digest(vae, only=("encoder.", "quant_conv."), before=icons.drawn.tobytes())


def encode_all(vae: Any, icons: Icons, cache: Path) -> NDArray[np.float16]:
    """Reads what was computed before for the same encoder and icons.

    Args:
        vae: AutoencoderKL whose config has the scaling factor.
        icons: N of them.
        cache: folder.

    Returns:
        (N, 12, C, h, w) float16, scaled.
    """
    path = cache / f"latents-{latents_digest(vae, icons).hex()[:16]}.npy"
    if path.is_file():
        return np.asarray(np.load(path, allow_pickle=False))
    rows = []
    with torch.inference_mode():
        for drawn in tqdm(icons.drawn, desc="encoding", unit="icon"):
            images = to_unit(lay_on(np.repeat(drawn[None], len(COLOURS), axis=0), COLOURS))
            latents = vae.encode(torch.from_numpy(images)).latent_dist.mean * vae.config.scaling_factor
            rows.append(latents.numpy().astype(np.float16))
    encoded = np.stack(rows)
    cache.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part.npy")
    np.save(aside, encoded, allow_pickle=False)
    aside.replace(path)
    return encoded
