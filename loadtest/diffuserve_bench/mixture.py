"""What the benchmarks ask for: workloads of the kinds of requests that they compare servers with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import msgspec

from diffuserve.bundle.manifest import ModelSpec
from diffuserve_loadtest.workload.arrivals import Arrivals, Bursts, Closed, Poisson
from diffuserve_loadtest.workload.due_times import due_times
from diffuserve_loadtest.workload.plan import PlannedRequest, plan
from diffuserve_loadtest.workload.workload import Requests, Workload

STEPS = (8, 12, 20, 30, 50)
GUIDANCE_SCALE = 5.0
SAMPLER = "dpmpp_2m"
PROMPT = "a slice of pizza, glossy"
_DAY_S = 86400.0


def sizes_of(model: ModelSpec) -> tuple[tuple[int, int], tuple[int, int]]:
    """The native (width, height), and about half the width and three quarters of the height, in pixels."""

    def near(side: float) -> int:
        return max(1, round(side / model.size_multiple)) * model.size_multiple

    return (model.width, model.height), (near(model.width / 2), near(model.height * 3 / 4))


def kind_of(steps: int, size: tuple[int, int], *, guided: bool = True) -> Requests:
    """Requests that cost the same, each with a text of its own, so that the text encoder has work to do.

    Args:
        steps: of each.
        size: width and height in pixels.
        guided: with guidance.
    """
    guidance_scale = GUIDANCE_SCALE if guided else 1.0
    prompt = f"{PROMPT}, number {{number}}"
    return Requests(
        prompt=prompt, steps=steps, guidance_scale=guidance_scale, sampler=SAMPLER, width=size[0], height=size[1]
    )


def kinds_of(model: ModelSpec, steps: Sequence[int] = STEPS) -> list[Requests]:
    """All combinations of steps, guidance and size; in the mixture they are equally frequent."""
    return [
        kind_of(count, size, guided=guided)
        for count, guided, size in itertools.product(steps, (True, False), sizes_of(model))
    ]


def poisson(kinds: Sequence[Requests], rate_per_s: float, count: int, seed: int) -> Workload:
    """`count` requests with exponential gaps, 1 / `rate_per_s` seconds on average. The same seed at another rate gives the
    same requests, only closer together."""
    endless = _workload(kinds, Poisson(rate_per_s=rate_per_s), math.inf, seed)
    after_the_last_s = next(itertools.islice(due_times(endless), count, None))
    return msgspec.structs.replace(endless, duration_s=after_the_last_s, max_in_flight=count)


def backlog(kinds: Sequence[Requests], count: int, seed: int) -> Workload:
    """Requests that are all there at the start."""
    workload = _workload(kinds, Bursts(rate_per_s=count, size=count), 1.0, seed)
    return msgspec.structs.replace(workload, max_in_flight=count)


def closed(
    kinds: Sequence[Requests], in_flight: int, requests: int | None = None, *, ramp_s: float = 0.0, seed: int = 1
) -> Workload:
    """As of `Closed`; without `requests` it goes on for a day, or until it is stopped."""
    return _workload(kinds, Closed(in_flight, requests, ramp_s), _DAY_S, seed)


def _workload(kinds: Sequence[Requests], arrivals: Arrivals, duration_s: float, seed: int) -> Workload:
    return Workload(
        "A benchmark.",
        arrivals,
        tuple(kinds),
        duration_s=duration_s,
        warm_up_s=0.0,
        seed=seed,
        patience_s=_DAY_S,
    )


def one_of_each(workload: Workload, block: int = 0) -> list[PlannedRequest]:
    """Requests of a workload whose kinds are equally frequent: of each kind one; another block has others."""
    count = len(workload.requests)
    return [plan(workload, number) for number in range(block * count, (block + 1) * count)]
