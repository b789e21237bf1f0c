"""A workload: which requests, and when they arrive. Small YAML files; those in `workloads/` are shipped.

    description: Requests of many kinds, as strangers send them.
    duration_s: 60
    arrivals:
      process: poisson
      load: 0.8
    requests:
      - steps: [8, 20, 50]
        guidance_scale: [1, 5]

Where a field of a request takes a list, each value is as likely as the others. The same seed gives the same requests at the
same times.
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec

from diffuserve.errors import InvalidRequest
from diffuserve_loadtest.workload.arrivals import Arrivals, Count, Positive, Rate

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Requests(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One part of the mixture; what is None is left to the server's defaults.

    Attributes:
        weight: its share, over the sum of all.
        prompt: `{number}` becomes the request's number, so that no two prompts are alike.
        cancel_share: share of the requests that are cancelled, `cancel_after_s` (from, to) seconds after they were sent.
    """

    weight: Positive = 1.0
    prompt: str | tuple[str, ...] = "a slice of pizza, glossy, number {number}"
    negative_prompt: str | None = None
    steps: int | tuple[int, ...] = 20
    sampler: str | tuple[str, ...] | None = None
    guidance_scale: float | tuple[float, ...] = 5.0
    width: Count | None = None
    height: Count | None = None
    num_images: int | tuple[int, ...] = 1
    priority: int | tuple[int, ...] | None = None
    timeout_ms: int | None = None
    format: str | None = None
    cancel_share: Share = 0.0
    cancel_after_s: tuple[float, float] = (0.0, 2.0)

    def __post_init__(self) -> None:
        # Not as constraints: msgspec 0.22 crashes on a constrained number or a tuple.
        for name in ("steps", "num_images"):
            values = getattr(self, name)
            if min(values if isinstance(values, tuple) else (values,), default=0) < 1:
                raise ValueError(f"{name} must be 1 or more")
        if not 0 <= self.cancel_after_s[0] <= self.cancel_after_s[1] < math.inf:
            raise ValueError("cancel_after_s must be two times, the earlier one first")


class Workload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a run does.

    Attributes:
        description: one line for people.
        arrivals: when requests are sent.
        requests: the mixture.
        duration_s: seconds in which requests are sent, at most, the warm-up included; the run ends when the last one has
            been answered.
        warm_up_s: requests due before this are sent and not counted.
        seed: of everything that is drawn.
        max_in_flight: of an open loop; what is due beyond it is not sent, and counted.
        patience_s: a request without an answer for so long counts as hung.
    """

    description: str
    arrivals: Arrivals
    requests: Annotated[tuple[Requests, ...], msgspec.Meta(min_length=1)] = (Requests(),)
    duration_s: Positive = 60.0
    warm_up_s: Annotated[float, msgspec.Meta(ge=0)] = 5.0
    seed: int = 1
    max_in_flight: Count = 1000
    patience_s: Positive = 120.0

    @property
    def needs_capacity(self) -> bool:
        """Whether a rate is a share of the server's capacity."""
        return isinstance(self.arrivals, Rate) and self.arrivals.load is not None

    def at_capacity(self, capacity_per_s: float) -> Workload:
        """The same with rates in requests a second.

        Args:
            capacity_per_s: requests of this mixture that the server answers in a second when there is always one more.

        Raises:
            InvalidRequest: the capacity is not positive.
        """
        if not 0 < capacity_per_s < math.inf:
            raise InvalidRequest(f"The capacity is {capacity_per_s} requests a second; it must be positive.")
        if not isinstance(self.arrivals, Rate) or self.arrivals.load is None:
            return self
        load = self.arrivals.load
        rate = (
            (load[0] * capacity_per_s, load[1] * capacity_per_s) if isinstance(load, tuple) else load * capacity_per_s
        )
        return msgspec.structs.replace(
            self, arrivals=msgspec.structs.replace(self.arrivals, rate_per_s=rate, load=None)
        )
