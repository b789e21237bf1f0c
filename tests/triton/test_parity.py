"""Images served by Triton against diffusers' own pipeline in fp32."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from diffuserve.samplers import SAMPLERS
from diffuserve.trials.similarity import psnr_db
from diffuserve_client import Client
from diffuserve_export.checkpoint.schedulers import scheduler_from_sampler

PROMPTS = ("a slice of pizza, glossy, on a blue background", "a red heart, flat")
SEEDS = (7, 4_000_000_000)
SIZES = ((128, 128), (64, 96))
# All samplers are compared with diffusers' in tests/core; three through the server make the default suite: the default one,
# one that draws noise and one that calls the UNet more often than it has steps.
_DEFAULT = ("dpmpp_2m", "euler_a", "pndm")


@pytest.mark.parametrize(
    "sampler",
    [pytest.param(sampler, marks=() if sampler in _DEFAULT else pytest.mark.slow) for sampler in SAMPLERS],
)
def test_served_images_are_those_of_diffusers(sampler: str, client: Client, reference_pipeline: Any) -> None:
    import torch

    pipe = reference_pipeline
    pipe.scheduler = scheduler_from_sampler(sampler, pipe.scheduler.config)
    subjects = list(zip(PROMPTS, SEEDS, strict=True))
    settings = [
        {"guidance_scale": guidance_scale, "steps": steps, "width": width, "height": height}
        for guidance_scale, (steps, (width, height)) in itertools.product((1.0, 5.0), zip((6, 12), SIZES, strict=True))
    ]

    def served(subject: tuple[str, int], setting: dict[str, Any]) -> Any:
        prompt, seed = subject
        return client.generate(prompt, seed=seed, sampler=sampler, **setting).images[0]

    with ThreadPoolExecutor(32) as pool:  # all at once, so that parity is shown in a mixed batch
        images = [[pool.submit(served, subject, setting) for subject in subjects] for setting in settings]
    figures = []
    for setting, row in zip(settings, images, strict=True):
        expected = pipe(
            [prompt for prompt, _ in subjects],
            generator=[torch.Generator().manual_seed(seed) for _, seed in subjects],
            num_inference_steps=setting["steps"],
            **{name: value for name, value in setting.items() if name != "steps"},
        ).images
        figures += [psnr_db(image.result(), reference) for image, reference in zip(row, expected, strict=True)]
    print(f"{sampler}: PSNR of {len(figures)} images: least {min(figures):.1f} dB, median {np.median(figures):.1f} dB")
    assert min(figures) >= 38
