"""What the engines can do without a server: seconds of one call of each stage by batch size, in this process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from diffuserve.bundle import ModelSpec, read_manifest
from diffuserve.costs import CallCosts
from diffuserve.engines import load_engine
from diffuserve.stages import Engine
from diffuserve.tensors import ENCODER_HIDDEN_STATES, TEXT_ENCODER, UNET, VAE_DECODER
from diffuserve_loadtest.mixture import Kind

BATCHES = (1, 2, 4, 8, 16)
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


@dataclass(frozen=True)
class StageSeconds:
    """Seconds of one call by batch size (for the UNet: rows), the median of several."""

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


def measure_stages(bundle: Path, size: tuple[int, int] | None = None, *, rounds: int = 3) -> StageSeconds:
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
        seconds_by_batch(engine(TEXT_ENCODER), text_inputs, BATCHES, rounds),
        seconds_by_batch(engine(UNET), lambda rows: unet_inputs(model, rows), ROWS, rounds),
        seconds_by_batch(engine(VAE_DECODER), latents, BATCHES, rounds),
    )


def unet_inputs(model: ModelSpec, rows: int) -> dict[str, NDArray[Any]]:
    """Unit noise at the model's size: (rows, C, h, w), timesteps (rows, 1) and text (rows, L, D), all float32."""
    rng = np.random.default_rng(0)
    scale = model.vae_scale_factor
    shape = (rows, model.latent_channels, model.height // scale, model.width // scale)
    return {
        "sample": rng.standard_normal(shape, np.float32),
        "timestep": np.full((rows, 1), 500, np.float32),
        ENCODER_HIDDEN_STATES: rng.standard_normal((rows, model.max_tokens, model.hidden_size), np.float32),
    }


def seconds_by_batch(
    engine: Engine, inputs_of: Callable[[int], dict[str, Any]], batches: Sequence[int], rounds: int
) -> dict[int, float]:
    """Seconds of a call by batch size: the median over rounds, after one call that is not counted.

    Each round times every size in turn, so that a slow spell of the machine falls on all of them alike, and calls the
    small ones several times, so that none is timed for a moment only.
    """
    inputs = {batch: inputs_of(batch) for batch in batches}
    for arrays in inputs.values():
        engine(arrays)
    times_s: dict[int, list[float]] = {batch: [] for batch in batches}
    for _ in range(rounds):
        for batch, arrays in inputs.items():
            calls = max(1, max(batches) // (2 * batch))
            times_s[batch].append(statistics.fmean(call_seconds(engine, arrays) for _ in range(calls)))
    return {batch: statistics.median(each) for batch, each in times_s.items()}


def mean_of(measurements: Sequence[StageSeconds]) -> StageSeconds:
    """Their mean, since the machine's speed may have changed between them."""

    def mean(parts: Sequence[dict[int, float]]) -> dict[int, float]:
        return {batch: statistics.fmean(part[batch] for part in parts) for batch in parts[0]}

    return StageSeconds(
        mean([each.text_encoder for each in measurements]),
        mean([each.unet for each in measurements]),
        mean([each.vae_decoder for each in measurements]),
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
