"""When requests arrive, as a workload's file says it: a closed loop, or one of several processes of an open loop."""

from __future__ import annotations

import math
from typing import Annotated

import msgspec

Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class Closed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="process", tag="closed"):
    """A fixed number of users, each of whom sends the next request when the last has been answered.

    Attributes:
        users: how many.
        requests: of all users together, after which the run ends; None: as many as fit into its duration.
        ramp_s: seconds in which the users begin, one after another.
    """

    users: Count
    requests: Count | None = None
    ramp_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class Rate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Requests a second, or as a share of the server's capacity, of which 1 is all; two numbers rise or fall linearly from the
    first to the second over the run. Exactly one of the two is given."""

    rate_per_s: float | tuple[float, float] | None = None
    load: float | tuple[float, float] | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.rate_per_s, self.load) if value is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of rate_per_s and load")
        # Not as a constraint: msgspec 0.22 crashes on a constrained number or a tuple.
        ends = given[0] if isinstance(given[0], tuple) else (given[0],)
        if not all(0 < end < math.inf for end in ends):
            raise ValueError("rate_per_s and load must be positive")


class Poisson(Rate, frozen=True, tag_field="process", tag="poisson"):
    """Strangers: exponential gaps."""


class Constant(Rate, frozen=True, tag_field="process", tag="constant"):
    """A clock: equal gaps."""


class Bursts(Rate, frozen=True, tag_field="process", tag="bursts"):
    """`size` requests at once, as often as the mean rate asks for."""

    size: Count = msgspec.field(default=10)


class Replay(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="process", tag="replay"):
    """The times, in seconds from the start, that are the first column of a CSV file; `speed` 2 takes half as long.

    A relative path is relative to the workload's file; once read, it is absolute.
    """

    file: str
    speed: Positive = 1.0


Arrivals = Closed | Poisson | Constant | Bursts | Replay
