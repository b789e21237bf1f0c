"""A workload: which requests, and when they arrive. Small YAML files; those in `shipped/` are shipped.

    description: Requests of many kinds, as strangers send them.
    duration_s: 60
    arrivals:
      process: poisson
      load: 0.8
    requests:
      - steps: [8, 20, 50]
        guidance_scale: [1, 5]

A part takes every setting of a request. In a list, each value is equally likely. The same seed gives the same requests at
the same times.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from diffuserve.errors import InvalidRequest
from diffuserve.request import FIELDS
from diffuserve_loadtest.workload.arrivals import Arrivals, Count, Positive, Rate

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is said of one part of the mixture beside the requests' own fields.

    Attributes:
        weight: its share, over the sum of all.
        cancel_share: share of the requests that are cancelled, `cancel_after_s` (from, to) seconds after they were sent.
    """

    weight: Positive = 1.0
    cancel_share: Share = 0.0
    cancel_after_s: tuple[float, float] = (0.0, 2.0)

    def __post_init__(self) -> None:
        # Not as constraints: msgspec 0.22 crashes on a constrained number or a tuple.
        for name in ("steps", "width", "height", "num_images"):
            values = getattr(self, name)
            if values is not None and min(values if isinstance(values, tuple) else (values,), default=0) < 1:
                raise ValueError(f"{name} must be 1 or more")
        if not 0 <= self.cancel_after_s[0] <= self.cancel_after_s[1] < math.inf:
            raise ValueError("cancel_after_s must be two times, the earlier one first")


SETTINGS = tuple(name for name, field in FIELDS.items() if field.setting and name != "seed")
"""The fields of a request that a workload chooses. Its seed is its number."""

_TYPE = {"BYTES": str, "INT64": int, "FP64": float, "BOOL": bool}
# What a workload leaves out is left to the server's defaults, but for these.
_DEFAULTS = {
    "prompt": "a slice of pizza, glossy, number {number}",
    "steps": 20,
    "guidance_scale": 5.0,
    "num_images": 1,
}

if TYPE_CHECKING:

    class Requests(Part, frozen=True):
        """One part of the mixture: a `Part` with the fields of SETTINGS, each a value, several, or None for the server's
        default. In a prompt, `{number}` becomes the request's number, so that no two are alike."""

        def __init__(self, **values: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...
else:

    def _one_or_several(name: str) -> Any:
        kind = _TYPE[FIELDS[name].dtype]
        return kind | tuple[kind, ...] if name in _DEFAULTS else kind | tuple[kind, ...] | None

    Requests = msgspec.defstruct(
        "Requests",
        [(name, _one_or_several(name), _DEFAULTS.get(name)) for name in SETTINGS],
        bases=(Part,),
        module=__name__,
        frozen=True,
        forbid_unknown_fields=True,
        kw_only=True,
    )


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
        """The same with rates in requests per second.

        Args:
            capacity_per_s: requests of this mixture that the server answers in a second when there is always one more.

        Raises:
            InvalidRequest: the capacity is not positive.
        """
        if not 0 < capacity_per_s < math.inf:
            raise InvalidRequest(f"The capacity is {capacity_per_s} requests per second; it must be positive.")
        if not isinstance(self.arrivals, Rate) or self.arrivals.load is None:
            return self
        load = self.arrivals.load
        rate = (
            (load[0] * capacity_per_s, load[1] * capacity_per_s) if isinstance(load, tuple) else load * capacity_per_s
        )
        return msgspec.structs.replace(
            self, arrivals=msgspec.structs.replace(self.arrivals, rate_per_s=rate, load=None)
        )
