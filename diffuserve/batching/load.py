"""What the models that share a device tell each other, so that each knows how late its requests will be.

Models of one server run in processes of their own, and their UNet calls share the device: each that has work gets the same
share. So a model that would need W seconds of the device alone is done after the sum of min(W, W_j) over all models j, itself
among them, that began together (processor sharing).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import msgspec


class Due(NamedTuple):
    """An accepted request that has a timeout: in how many seconds its model will have done its UNet calls if it has the device
    alone, and when it expires, on the monotonic clock, which is the same in all processes of a machine."""

    seconds: float
    end_s: float


class Load(msgspec.Struct, frozen=True):
    """What one model still has to do.

    Attributes:
        requests: accepted and not yet answered.
        seconds: that their UNet calls will take if the model has the device alone.
        outside_s: what a request takes besides its UNet calls, of late.
        due: those of them that may expire.
        busy_s: for how many seconds in all the model has had requests, until `told_s`.
        told_s: when this was said, on the monotonic clock.
    """

    requests: int = 0
    seconds: float = 0.0
    outside_s: float = 0.0
    due: tuple[Due, ...] = ()
    busy_s: float = 0.0
    told_s: float = 0.0

    def busy_until_s(self, now_s: float) -> float:
        """`busy_s` until now, since a model that has requests says so before it has none."""
        return self.busy_s + (max(0.0, now_s - self.told_s) if self.requests else 0.0)


class Neighbours(Protocol):
    """The other models on the same device. Both calls are quick and raise nothing."""

    def publish(self, load: Load) -> None:
        """Lets them know what this model has to do."""
        ...

    def loads(self) -> Sequence[Load]:
        """What each of them has to do."""
        ...


def share_beside(others: float) -> float:
    """The share of the device that a model gets beside so many others; between two whole numbers, as long as it is shared with
    the one and the other number of them."""
    fewer = math.floor(others)
    return (fewer + 1 - others) / (1 + fewer) + (others - fewer) / (2 + fewer)


def shared_s(alone_s: float, others_s: Iterable[float]) -> float:
    """Seconds in which work of `alone_s` seconds is done beside other models that have so much to do."""
    return alone_s + sum(min(alone_s, other_s) for other_s in others_s)
