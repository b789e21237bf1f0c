"""What a search for the highest rate tried, and what it found."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Try(msgspec.Struct, frozen=True):
    """One rate; `latency_s` by name, as of `Measures`."""

    rate_per_s: float
    kept: bool
    latency_s: dict[str, float]
    goodput_per_s: float


class Found(msgspec.Struct, frozen=True):
    """`rate_per_s`: the highest that kept the SLO, within 5 %; None if even the lowest that was tried did not."""

    rate_per_s: float | None
    tries: Sequence[Try]

    @property
    def words(self) -> str:
        """The result as a sentence."""
        if self.rate_per_s is None:
            lowest = min(each.rate_per_s for each in self.tries)
            return f"No rate kept the service level, not even {lowest:.3g} requests/s."
        at_least = "At least " if all(each.kept for each in self.tries) else ""
        return f"{at_least}{self.rate_per_s:.3g} requests/s kept the service level."
