"""The latents of every icon on every background, computed once for each autoencoder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from diffuserve_training.backgrounds import COLOURS, lay_on
from diffuserve_training.dataset import Icons, to_unit


def scaling_factor_of(vae: Any, images: NDArray[np.float32]) -> float:
    """One over the deviation of the latents of some images (Rombach et al., arXiv:2112.10752, section D.1)."""
    with torch.inference_mode():
        return 1 / float(vae.encode(torch.from_numpy(images)).latent_dist.mean.std())


def encode_all(vae: Any, icons: Icons, cache: Path) -> NDArray[np.float16]:
    """Reads what was computed before for the same encoder and icons.

    Args:
        vae: AutoencoderKL whose config has the scaling factor.
        icons: N of them.
        cache: folder.

    Returns:
        (N, 12, C, h, w) float16, scaled.
    """
    digest = hashlib.sha256(icons.drawn.tobytes())
    for name, weight in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(name.encode() + weight.numpy().tobytes())
    path = cache / f"latents-{digest.hexdigest()[:16]}.npy"
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
