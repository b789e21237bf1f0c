"""Drawing with a checkpoint through diffusers' own pipeline, as evaluation and grids do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BATCH = 16


def load_pipeline(folder: Path) -> Any:
    """In fp32, with DPM++ 2M and without progress bars, on a GPU if there is one."""
    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def draw(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    size: tuple[int, int] | None = None,
) -> NDArray[np.uint8]:
    """One image for each prompt and seed, of a width and height, or the checkpoint's own.

    Returns:
        (N, H, W, 3) uint8.
    """
    import torch
    from tqdm import tqdm

    batch = _BATCH if pipeline.device.type == "cpu" else 8 * _BATCH
    width, height = size or (None, None)
    images = []
    for start in tqdm(range(0, len(prompts), batch), desc="drawing", unit="batch", leave=False):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch]]
        drawn = pipeline(
            list(prompts[start : start + batch]),
            width=width,
            height=height,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=generators,
            output_type="np",
        ).images
        images.append((drawn * 255).round().astype(np.uint8))
    return np.concatenate(images)


def grid(images: NDArray[np.uint8], columns: int) -> Any:
    """One PIL image of (N, H, W, 3) images, row by row."""
    from PIL import Image

    rows = -(-len(images) // columns)
    height, width = images.shape[1:3]
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for index, image in enumerate(images):
        sheet.paste(Image.fromarray(image), (index % columns * width, index // columns * height))
    return sheet
