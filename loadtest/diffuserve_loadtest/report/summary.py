"""A sample in four figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Summary:
    """Mean and percentiles, in the sample's unit."""

    mean: float
    p50: float
    p95: float
    p99: float

    def cells(self) -> tuple[str, str, str, str]:
        """The figures as table cells, named by `HEADER`."""
        return f"{self.mean:.2f}", f"{self.p50:.2f}", f"{self.p95:.2f}", f"{self.p99:.2f}"


HEADER = ("mean", "p50", "p95", "p99")


def summarise(values: Sequence[float]) -> Summary:
    """Percentiles are interpolated between neighbours.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("There is nothing to summarise.")
    p50, p95, p99 = (float(value) for value in np.percentile(values, (50, 95, 99)))
    return Summary(float(np.mean(values)), p50, p95, p99)


def throughput(completed_s: Sequence[float], warm_up: int) -> float:
    """Completions a second from completion number `warm_up` (from 1) to the last one.

    In a closed loop of n requests that finish in bursts, `warm_up` and the number of completions must both be multiples
    of n, so that the window starts and ends at the same place in a burst.

    Raises:
        ValueError: there are no completions after the warm-up.
    """
    ordered = sorted(completed_s)
    if warm_up < 1 or len(ordered) <= warm_up:
        raise ValueError(f"{len(ordered)} completions are too few for a warm-up of {warm_up}.")
    return (len(ordered) - warm_up) / (ordered[-1] - ordered[warm_up - 1])
