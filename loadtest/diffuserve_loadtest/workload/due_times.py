"""When the requests of an open loop are due.

Whatever the process, a request is due when the expected number of requests so far reaches some amount: 0, 1, 2 ... for a
clock, multiples of the size for bursts, and sums of exponential numbers for Poisson arrivals (Çinlar, Introduction to
Stochastic Processes, 1975, chapter 4.7). With a rate that changes linearly that is the root of a quadratic equation.
"""

from __future__ import annotations

import csv
import itertools
import math
import random
from collections.abc import Iterator
from pathlib import Path

from diffuserve.errors import InvalidRequest
from diffuserve_loadtest.workload.arrivals import Bursts, Constant, Poisson, Rate, Replay
from diffuserve_loadtest.workload.workload import Workload

MAX_REPLAYED = 1_000_000


def due_times(workload: Workload) -> Iterator[float]:
    """Seconds from the start, rising, all less than the workload's duration; the same for the same seed.

    Raises:
        InvalidRequest: the rates are shares of a capacity that is not known, or the file to replay is not a list of times.
        TypeError: the workload is a closed loop.
    """
    arrivals, duration_s = workload.arrivals, workload.duration_s
    if isinstance(arrivals, Replay):
        return itertools.takewhile(lambda at_s: at_s < duration_s, replayed_times(arrivals))
    if not isinstance(arrivals, Rate):
        raise TypeError("a closed loop has no due times")
    return _times(arrivals, duration_s, workload.seed)


def replayed_times(replay: Replay) -> list[float]:
    """All times of a file. Raises `InvalidRequest`."""
    times_s: list[float] = []
    try:
        with Path(replay.file).open(newline="") as file:
            for row in itertools.islice(csv.reader(file), MAX_REPLAYED + 1):
                if row and not (not times_s and _is_header(row[0])):
                    times_s.append(float(row[0]) / replay.speed)
    except OSError as error:
        raise InvalidRequest(f"{replay.file} cannot be replayed: {error.strerror}.") from None
    except (ValueError, csv.Error) as error:
        raise InvalidRequest(f"{replay.file} cannot be replayed: its first column must be seconds ({error}).") from None
    if len(times_s) > MAX_REPLAYED:
        raise InvalidRequest(f"{replay.file} has more than {MAX_REPLAYED} times, which is the most that is replayed.")
    if not all(math.isfinite(at_s) and at_s >= 0 for at_s in times_s):
        raise InvalidRequest(f"{replay.file} cannot be replayed: its times must be finite and not negative.")
    return sorted(times_s)


def _is_header(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return True
    return False


def _times(arrivals: Rate, duration_s: float, seed: int) -> Iterator[float]:
    rate = arrivals.rate_per_s
    if rate is None:
        raise InvalidRequest(
            "The workload's rate is a share of the server's capacity: say what that is, --capacity-per-s."
        )
    first, last = rate if isinstance(rate, tuple) else (rate, rate)
    slope = (last - first) / duration_s
    for amount in _amounts(arrivals, seed):
        under_root = first * first + 2 * slope * amount
        if under_root < 0:  # a falling rate never brings so many
            return
        # The usual form of the root would divide by a slope of zero.
        at_s = 2 * amount / (first + math.sqrt(under_root))
        if at_s >= duration_s:
            return
        yield at_s


def _amounts(arrivals: Rate, seed: int) -> Iterator[float]:
    """Expected numbers of requests at which the next one is due."""
    if isinstance(arrivals, Poisson):
        choose = random.Random(f"arrivals {seed}")  # noqa: S311 - a load, no secret
        yield from itertools.accumulate(choose.expovariate(1.0) for _ in itertools.count())
    elif isinstance(arrivals, Constant):
        yield from map(float, itertools.count())
    elif isinstance(arrivals, Bursts):
        for burst in itertools.count():
            yield from itertools.repeat(float(burst * arrivals.size), arrivals.size)
