"""Requests of many kinds, and when they arrive."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffuserve.bundle import ModelSpec
from diffuserve_loadtest.stage_seconds import StageSeconds, best_request_s

STEPS = (8, 12, 20, 30, 50)
GUIDANCE_SCALE = 5.0
SAMPLER = "dpmpp_2m"
PROMPT = "a slice of pizza, glossy"


@dataclass(frozen=True)
class Kind:
    """Requests that cost the same; width and height in pixels."""

    steps: int
    guided: bool
    width: int
    height: int

    @property
    def rows(self) -> int:
        """UNet rows a step."""
        return 2 if self.guided else 1

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    def fields(self, seed: int) -> dict[str, Any]:
        """A request of this kind. The prompt depends on the seed, so that the text encoder has work to do."""
        return {
            "prompt": f"{PROMPT}, number {seed}",
            "steps": self.steps,
            "guidance_scale": GUIDANCE_SCALE if self.guided else 1.0,
            "sampler": SAMPLER,
            "width": self.width,
            "height": self.height,
            "seed": seed,
        }


@dataclass(frozen=True)
class Arrival:
    """A request that a client sends `at_s` seconds after the start, whether or not earlier ones have been answered."""

    at_s: float
    kind: Kind
    seed: int


def sizes_of(model: ModelSpec) -> tuple[tuple[int, int], tuple[int, int]]:
    """The native (width, height), and about half the width and three quarters of the height, in pixels."""

    def near(side: float) -> int:
        return max(1, round(side / model.size_multiple)) * model.size_multiple

    return (model.width, model.height), (near(model.width / 2), near(model.height * 3 / 4))


def kinds_of(model: ModelSpec, steps: Sequence[int] = STEPS) -> list[Kind]:
    """All combinations of steps, guidance and size; in the mixture they are equally frequent."""
    return [
        Kind(count, guided, width, height)
        for count, guided, (width, height) in itertools.product(steps, (True, False), sizes_of(model))
    ]


def shuffled_forever(kinds: Sequence[Kind], seed: int) -> Iterator[Kind]:
    """All kinds in random order, again and again: any long stretch has the same mixture."""
    choose = random.Random(seed)  # noqa: S311 - a load, no secret
    while True:
        yield from choose.sample(kinds, len(kinds))


def poisson_arrivals(kinds: Sequence[Kind], rate_per_s: float, count: int, seed: int) -> list[Arrival]:
    """`count` arrivals of the mixture with exponential gaps, 1 / `rate_per_s` seconds on average. The same seed at
    another rate gives the same requests, only closer together."""
    choose = random.Random(seed)  # noqa: S311 - a load, no secret
    times_s = itertools.accumulate(choose.expovariate(1.0) / rate_per_s for _ in range(count))
    return [
        Arrival(at_s, kind, number)
        for number, (at_s, kind) in enumerate(zip(times_s, shuffled_forever(kinds, seed), strict=False))
    ]


def best_mixture_per_s(kinds: Sequence[Kind], seconds: Mapping[tuple[int, int], StageSeconds], max_rows: int) -> float:
    """Requests a second if every row, text and image ran in the batch that is cheapest for one of them.

    Args:
        kinds: equally frequent.
        seconds: by (width, height) in pixels.
        max_rows: rows of a UNet call, at most.
    """

    return len(kinds) / sum(best_request_s(seconds[kind.size], kind.steps * kind.rows, 1, max_rows) for kind in kinds)
