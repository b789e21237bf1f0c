"""What the engines can do without a server: seconds of one call of each stage by batch size, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from diffuserve.bundle import read_manifest
from diffuserve.costs import CallCosts
from diffuserve.engines import load_engine
from diffuserve.engines.timing import unet_inputs, unet_seconds
from diffuserve.stages import Engine
from diffuserve.tensors import TEXT_ENCODER, UNET, VAE_DECODER
from diffuserve_loadtest.mixture import Kind

BATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class StageSeconds:
    """Seconds of one call by batch size (for the UNet: rows), the fastest of several."""

    text_encoder: dict[int, float]
    unet: dict[int, float]
    vae_decoder: dict[int, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def batch_s(self, images: int, steps: int, rows_per_image: int = 2) -> float:
        """A batch of images from text to pixels, stage after stage."""
        unet_s = steps * CallCosts(self.unet).seconds(images * rows_per_image)
        return CallCosts(self.text_encoder).seconds(images) + unet_s + CallCosts(self.vae_decoder).seconds(images)

    def best_images_per_s(self, steps: int, max_rows: int, rows_per_image: int = 2) -> tuple[float, int]:
        """The highest rate that batches of one size reach one after another, and that size."""
        sizes = range(1, max_rows // rows_per_image + 1)
        return max((images / self.batch_s(images, steps, rows_per_image), images) for images in sizes)


def measure_stages(bundle: Path, size: tuple[int, int] | None = None, *, repeats: int = 3) -> StageSeconds:
    """Times the bundle's engines at one image size, (width, height) in pixels; by default the native one."""
    manifest = read_manifest(bundle)
    model = manifest.model
    if size is not None:
        model = msgspec.structs.replace(model, width=size[0], height=size[1])

    def engine(name: str) -> Engine:
        return load_engine(bundle / manifest.components[name].files[0].path, manifest.components[name], threads=0)

    def text_inputs(batch: int) -> dict[str, Any]:
        return {"input_ids": np.zeros((batch, model.max_tokens), np.int32)}

    def latents(batch: int) -> dict[str, Any]:
        return {"latent_sample": unet_inputs(model, batch)["sample"]}

    return StageSeconds(
        _fastest(engine(TEXT_ENCODER), text_inputs, repeats),
        unet_seconds(engine(UNET), model, repeats=repeats),
        _fastest(engine(VAE_DECODER), latents, repeats),
    )


def mean_of(before: StageSeconds, after: StageSeconds) -> StageSeconds:
    """The mean of two measurements, since the machine's speed may have changed between them."""

    def mean(one: dict[int, float], other: dict[int, float]) -> dict[int, float]:
        return {batch: (one[batch] + other[batch]) / 2 for batch in one}

    return StageSeconds(
        mean(before.text_encoder, after.text_encoder),
        mean(before.unet, after.unet),
        mean(before.vae_decoder, after.vae_decoder),
    )


def best_mixture_per_s(kinds: Sequence[Kind], seconds: Mapping[tuple[int, int], StageSeconds], max_rows: int) -> float:
    """Requests a second if every row, text and image ran in the batch that is cheapest for one of them.

    Args:
        kinds: equally frequent.
        seconds: by (width, height) in pixels.
        max_rows: rows of a UNet call, at most.
    """

    def each_s(costs: Mapping[int, float], most: int) -> float:
        return min(CallCosts(costs).seconds(batch) / batch for batch in range(1, most + 1))

    def request_s(kind: Kind) -> float:
        stages = seconds[kind.size]
        row_s = each_s(stages.unet, max_rows)
        ends_s = each_s(stages.text_encoder, max(BATCHES)) + each_s(stages.vae_decoder, max(BATCHES))
        return kind.steps * kind.rows * row_s + ends_s

    return len(kinds) / sum(map(request_s, kinds))


def call_seconds(engine: Engine, inputs: Mapping[str, Any]) -> float:
    """One call."""
    started_s = time.perf_counter()
    engine(inputs)
    return time.perf_counter() - started_s


def _fastest(engine: Engine, inputs_of: Callable[[int], dict[str, Any]], repeats: int) -> dict[int, float]:
    """The fastest of `repeats` calls for each batch size, after one that is not counted."""
    seconds = {}
    for batch in BATCHES:
        inputs = inputs_of(batch)
        engine(inputs)
        seconds[batch] = min(call_seconds(engine, inputs) for _ in range(repeats))
    return seconds
