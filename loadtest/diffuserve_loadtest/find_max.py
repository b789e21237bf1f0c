"""The highest rate of Poisson arrivals at which a server keeps an SLO: its goodput."""

from __future__ import annotations

from collections.abc import Callable

from diffuserve_loadtest.report.found import Found, Try

_PRECISION = 0.05
_DOUBLINGS = 6


def find_max(attempt: Callable[[float], Try], guess_per_s: float, precision: float = _PRECISION) -> Found:
    """Doubles or halves from the guess until the answer lies between two rates, then halves their ratio.

    Args:
        attempt: tries one rate, in requests per second.
        guess_per_s: where to begin.
        precision: the ratio of the two last rates is at most 1 + this.
    """
    tries = [attempt(guess_per_s)]
    factor = 2.0 if tries[0].kept else 0.5
    while len(tries) <= _DOUBLINGS and tries[-1].kept == tries[0].kept:
        tries.append(attempt(tries[-1].rate_per_s * factor))
    kept = max((each.rate_per_s for each in tries if each.kept), default=None)
    broken = min((each.rate_per_s for each in tries if not each.kept), default=None)
    while kept is not None and broken is not None and broken > kept * (1 + precision):
        tries.append(attempt((kept * broken) ** 0.5))
        if tries[-1].kept:
            kept = tries[-1].rate_per_s
        else:
            broken = tries[-1].rate_per_s
    return Found(kept, tries)
