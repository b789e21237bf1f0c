"""The reference image: drawn by diffusers' own pipeline from the checkpoint in fp32, kept in the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from diffuserve.bundle.checksums import describe_file
from diffuserve.bundle.manifest import ModelSpec, ReferenceImage
from diffuserve.errors import CheckpointError
from diffuserve.tensors import TEXT_ENCODER
from diffuserve_export.checkpoint.checkpoint import Checkpoint
from diffuserve_export.checkpoint.loaded_model import LoadedModel
from diffuserve_export.checkpoint.schedulers import scheduler_from_sampler
from diffuserve_export.graphs.finite_values import watched
from diffuserve_export.quiet import quiet
from diffuserve_export.sizes import native_units

FILE_NAME = "reference.png"
_PROMPT = "a red apple on a wooden table, a blue sky behind it"
_SEED = 1
# Weights times latent pixels times steps: how much a CPU computes in about a minute. Small models get all their steps.
_WORK = 4e12
_MIN_STEPS = 4  # some checkpoints' pndm takes no fewer


def reference_from_model(
    checkpoint: Checkpoint, model: LoadedModel, folder: Path, *, strict: bool = True
) -> ReferenceImage:
    """Draws the image into `folder`.

    Args:
        checkpoint: what the model was loaded from.
        model: in fp32.
        folder: the bundle's.
        strict: whether an image of one colour raises.

    Raises:
        CheckpointError: a component makes values that are not finite, or the image is of one colour, to which any other
            model that draws nothing would compare equal.
    """
    import torch

    spec = checkpoint.spec
    rows, columns = native_units(spec)
    height, width = rows * spec.size_multiple, columns * spec.size_multiple
    latent_pixels = (height // spec.vae_scale_factor) * (width // spec.vae_scale_factor)
    affordable = int(_WORK / (checkpoint.parameters * latent_pixels))
    steps = min(spec.default_steps, max(_MIN_STEPS, affordable))
    # Bundles leave layers out for every text, diffusers not for the negative prompt: so there is none then.
    guidance_scale = 1.0 if spec.clip_skip else spec.default_guidance_scale
    with quiet(), torch.inference_mode(), watched(model, spec.name) as watch:
        pipeline = model.pipeline()
        pipeline.scheduler = scheduler_from_sampler(spec.default_sampler, checkpoint.configs["scheduler"])
        pipeline.set_progress_bar_config(disable=True)
        image = pipeline(
            **(_embedded(model, spec) if spec.clip_skip else {"prompt": _PROMPT}),
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(_SEED),
            **watch,
        ).images[0]
    pixels = np.asarray(image).reshape(-1, 3)
    if strict and (pixels == pixels[0]).all():
        colour = "#{:02x}{:02x}{:02x}".format(*pixels[0])
        raise CheckpointError(
            f"{spec.name}: the image that diffusers draws to compare with has one colour, {colour}, so no difference would be "
            "found. Either a weight is wrong, or the scheduler's config is not the one it was trained with: see what "
            "diffusers draws of other prompts. If it is meant to draw that, export it with --allow-differences. No bundle "
            "was written."
        )
    image.save(folder / FILE_NAME)
    return ReferenceImage(
        file=describe_file(folder, folder / FILE_NAME),
        prompt=_PROMPT,
        seed=_SEED,
        steps=steps,
        guidance_scale=guidance_scale,
        sampler=spec.default_sampler,
        width=width,
        height=height,
    )


def _embedded(model: LoadedModel, spec: ModelSpec) -> dict[str, Any]:
    """The prompt, encoded without the last layers: diffusers' own clip_skip fails with transformers 5.6 and later."""
    from diffuserve_export.graphs.modules import modules_from_model

    ids = [
        tokenizer(
            _PROMPT, padding="max_length", truncation=True, max_length=spec.max_tokens, return_tensors="pt"
        ).input_ids
        for tokenizer in model.tokenizers.values()
    ]
    encoded = modules_from_model(model, spec)[TEXT_ENCODER](*ids)
    names = ("prompt_embeds", "pooled_prompt_embeds")
    return dict(zip(names, encoded if isinstance(encoded, tuple) else (encoded,), strict=False))
