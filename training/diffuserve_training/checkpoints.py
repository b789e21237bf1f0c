"""What a training leaves: folders in diffusers' format, fp16 safetensors, written aside and renamed."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffuserve_training.half_range import fit_half_range


def save_vae(vae: Any, scaling_factor: float, images: torch.Tensor, folder: Path) -> Any:
    """The autoencoder in fp32, since stage two measures its latents with it; in fp16 it will not overflow on images like those
    that are given.

    Returns:
        What was saved.
    """
    vae = copy.deepcopy(vae)
    fit_half_range(vae, images)
    vae.register_to_config(scaling_factor=scaling_factor)
    _replace(folder, vae.save_pretrained)
    return vae


def save_pipeline(
    *, vae: Any, text_encoder: Any, unet: Any, tokenizer: Any, scheduler: Any, defaults: Mapping[str, Any], folder: Path
) -> None:
    """A whole Stable Diffusion checkpoint in fp16, with diffuserve.json for the defaults. The modules stay as they are."""
    import diffusers

    library: Any = diffusers
    pipeline = library.StableDiffusionPipeline(
        vae=_half(vae),
        text_encoder=_half(text_encoder),
        tokenizer=tokenizer,
        unet=_half(unet),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )

    def save(aside: Path) -> None:
        pipeline.save_pretrained(aside, safe_serialization=True)
        tokenizer.backend_tokenizer.model.save(str(aside / "tokenizer"))  # the files that transformers read before 5
        (aside / "diffuserve.json").write_text(json.dumps(dict(defaults), indent=2) + "\n")

    _replace(folder, save)


def replace_vae(checkpoint: Path, vae: Any) -> None:
    """Another autoencoder for a checkpoint, in fp16."""
    _replace(checkpoint / "vae", _half(vae).save_pretrained)


def _half(module: Any) -> Any:
    half = copy.deepcopy(module).to("cpu", torch.float16).eval()
    if hasattr(half, "register_to_config"):  # diffusers would tell everyone from which folder it was loaded
        half.register_to_config(_name_or_path="")
    return half


def _replace(folder: Path, save: Any) -> None:
    aside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    save(aside)
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        aside.rename(folder)
        shutil.rmtree(old)
    else:
        aside.rename(folder)
