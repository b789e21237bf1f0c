"""What each request of a workload is. Request n is the same in every run and whichever process sends it."""

from __future__ import annotations

import bisect
import itertools
import random
from dataclasses import dataclass
from typing import Any

from diffuserve_loadtest.workload.workload import SETTINGS, Requests, Workload

# The order in which values are drawn: another would make other requests of the same workload and seed.
_DRAWN = tuple(dict.fromkeys(("steps", "num_images", "guidance_scale", "prompt", *SETTINGS)))


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
    fields = {name: _one(choose, value) for name in _DRAWN if (value := getattr(part, name)) is not None}
    fields |= {"prompt": fields["prompt"].replace("{number}", str(number)), "seed": number % 2**32}
    cancelled = choose.random() < part.cancel_share
    cancel_after_s = choose.uniform(*part.cancel_after_s)
    return PlannedRequest(
        number,
        fields,
        _in_words(fields),
        fields["steps"] * fields["num_images"] * (2 if fields["guidance_scale"] > 1 else 1),
        fields["num_images"],
        (fields.get("width"), fields.get("height")),
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


def _in_words(fields: dict[str, Any]) -> str:
    words = [f"{fields['steps']} steps"]
    if "width" in fields or "height" in fields:
        words.append(f"{fields.get('width', 'default')} x {fields.get('height', 'default')}")
    if fields["num_images"] > 1:
        words.append(f"{fields['num_images']} images")
    words.append("guided" if fields["guidance_scale"] > 1 else "unguided")
    return ", ".join(words)
