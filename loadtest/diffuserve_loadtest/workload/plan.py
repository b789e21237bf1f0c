"""What each request of a workload is. Request n is the same in every run and whichever process sends it."""

from __future__ import annotations

import bisect
import itertools
import random
from dataclasses import dataclass
from typing import Any

from diffuserve_loadtest.workload.workload import Requests, Workload

_PLAIN = ("negative_prompt", "width", "height", "timeout_ms", "format")


@dataclass(frozen=True)
class PlannedRequest:
    """One request.

    Attributes:
        number: from 0.
        fields: as they go to the server, the prompt among them.
        kind: what it costs, in words.
        unet_rows: UNet rows that it takes in all.
        images: that it asks for.
        size: width and height in pixels; None where the server's default is asked for.
        cancel_after_s: seconds after it was sent; None for most.
    """

    number: int
    fields: dict[str, Any]
    kind: str
    unet_rows: int
    images: int
    size: tuple[int | None, int | None]
    cancel_after_s: float | None

    @property
    def rows(self) -> int:
        """UNet rows that it takes per step."""
        steps: int = self.fields["steps"]
        return self.unet_rows // steps


def plan(workload: Workload, number: int) -> PlannedRequest:
    """Request `number` of a workload. Its seed is its number too, so that answers can be compared between runs."""
    choose = random.Random(f"request {workload.seed} {number}")  # noqa: S311 - a load, no secret
    part = _part_of(workload, number)
    steps, images = _one(choose, part.steps), _one(choose, part.num_images)
    guidance_scale = _one(choose, part.guidance_scale)
    guided = guidance_scale > 1
    fields: dict[str, Any] = {
        "prompt": _one(choose, part.prompt).replace("{number}", str(number)),
        "steps": steps,
        "guidance_scale": guidance_scale,
        "num_images": images,
        "seed": number % 2**32,
    }
    for name in _PLAIN:
        if (value := getattr(part, name)) is not None:
            fields[name] = value
    for name in ("sampler", "priority"):
        if (values := getattr(part, name)) is not None:
            fields[name] = _one(choose, values)
    cancelled = choose.random() < part.cancel_share
    cancel_after_s = choose.uniform(*part.cancel_after_s)
    return PlannedRequest(
        number,
        fields,
        _in_words(part, steps, images, guided),
        steps * images * (2 if guided else 1),
        images,
        (part.width, part.height),
        cancel_after_s if cancelled else None,
    )


def _part_of(workload: Workload, number: int) -> Requests:
    """Systematic sampling (Madow and Madow, On the Theory of Systematic Sampling, 1944), block by block, each of as many
    requests as there are parts: a short run has the weights' shares, too. Parts of one weight come once in each block."""
    count = len(workload.requests)
    block, place = divmod(number, count)
    choose = random.Random(f"block {workload.seed} {block}")  # noqa: S311 - a load, no secret
    ranks, offset = choose.sample(range(count), count), choose.random()
    bounds = list(itertools.accumulate(part.weight for part in workload.requests))
    at = (ranks[place] + offset) * bounds[-1] / count
    return workload.requests[min(bisect.bisect_right(bounds, at), count - 1)]


def _one(choose: random.Random, values: Any) -> Any:
    """The value, or one of several."""
    return choose.choice(values) if isinstance(values, (list, tuple)) else values


def _in_words(part: Requests, steps: int, images: int, guided: bool) -> str:
    words = [f"{steps} steps"]
    if part.width is not None or part.height is not None:
        words.append(f"{part.width or 'default'} x {part.height or 'default'}")
    if images > 1:
        words.append(f"{images} images")
    words.append("guided" if guided else "unguided")
    return ", ".join(words)
