"""The model's UNet and VAE in PyTorch, with random weights, from diffusers' configs beside its graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffuserve_bench.gpu.record import Skipped

if TYPE_CHECKING:
    import torch


def random_unet(bundle: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """diffusers' UNet2DConditionModel with channels last, which convolutions on tensor cores prefer.

    Raises:
        Skipped: the model has no config for diffusers.
        ModuleNotFoundError: diffusers is not installed.
    """
    from diffusers import UNet2DConditionModel

    return _random(UNet2DConditionModel, bundle / "unet" / "config.json", device, dtype)


def random_vae(bundle: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """diffusers' AutoencoderKL; errors as `random_unet`."""
    from diffusers import AutoencoderKL

    return _random(AutoencoderKL, bundle / "vae" / "config.json", device, dtype)


def _random(model_class: Any, config: Path, device: torch.device, dtype: torch.dtype) -> Any:
    import torch

    if not config.is_file():
        raise Skipped(f"{config.parent} has no config.json; diffuserve export --without-weights writes it")
    torch.manual_seed(0)
    with device:
        model = model_class.from_config(json.loads(config.read_text()))
    return model.eval().requires_grad_(False).to(dtype).to(memory_format=torch.channels_last)
