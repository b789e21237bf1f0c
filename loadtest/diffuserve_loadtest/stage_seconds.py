"""What the engines can do without a server: seconds of one call of each stage by batch size, in this process."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from diffuserve.batching.costs import CallCosts
from diffuserve.bundle.manifest import read_manifest
from diffuserve.engines import load_engine
from diffuserve.engines.example_inputs import example_inputs
from diffuserve.stages import Engine
from diffuserve.tensors import TEXT_ENCODER, UNET, VAE_DECODER

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

    def measure(name: str, batches: Sequence[int]) -> dict[int, float]:
        component = manifest.components[name]
        engine = load_engine(bundle / component.files[0].path, component, threads=0)
        return seconds_by_batch(engine, lambda batch: example_inputs(component.tensors, model, batch), batches, rounds)

    return StageSeconds(measure(TEXT_ENCODER, BATCHES), measure(UNET, ROWS), measure(VAE_DECODER, BATCHES))


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


def best_request_s(stages: StageSeconds, unet_rows: int, images: int, max_rows: int) -> float:
    """Seconds of one request's text, UNet rows and images, each in the batch that is cheapest for one of them."""

    def each_s(costs: Mapping[int, float], most: int) -> float:
        return min(CallCosts(costs).seconds(batch) / batch for batch in range(1, most + 1))

    text_s, image_s = each_s(stages.text_encoder, max(BATCHES)), each_s(stages.vae_decoder, max(BATCHES))
    return text_s + unet_rows * each_s(stages.unet, max_rows) + images * image_s


def call_seconds(engine: Engine, inputs: Mapping[str, Any]) -> float:
    """One call."""
    started_s = time.perf_counter()
    engine(inputs)
    return time.perf_counter() - started_s


def random_sizes(count: int, most: int, seed: int) -> list[int]:
    """Sizes from 1 to `most`, no two in a row alike."""
    choose = random.Random(seed)  # noqa: S311 - a load, no secret
    sizes = [choose.randint(1, most)]
    while len(sizes) < count:
        sizes.append((sizes[-1] + choose.randrange(1, most) - 1) % most + 1)
    return sizes
