"""The requests that have been accepted and not answered yet: the one place that knows them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from diffuserve.batching.jobs import LatentShape


@dataclass(eq=False)
class Entry:
    """An accepted request.

    Attributes:
        shape: (C, h, w) of its latents.
        chunks: of its embedded prompt.
        images: that it draws.
        rows_per_image: UNet rows that each takes in a call; they are never in different calls.
        evaluations_left: UNet evaluations that it still needs.
        priority: 0 (first) .. 9 (last).
        end_s: when it expires, on the clock of whoever asks; infinite without a timeout.
        begun: whether its first step is done.
    """

    shape: LatentShape
    chunks: int
    images: int
    rows_per_image: int
    evaluations_left: int
    priority: int
    end_s: float = math.inf
    begun: bool = False

    @property
    def rows(self) -> int:
        """UNet rows that all its images take."""
        return self.images * self.rows_per_image


class Ledger:
    """Entries in order of arrival. Written on the event loop; `gauges` may be read by any thread."""

    def __init__(self) -> None:
        self._entries: dict[Entry, None] = {}

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: Entry) -> None:
        self._entries[entry] = None

    def remove(self, entry: Entry) -> None:
        del self._entries[entry]

    @property
    def waiting(self) -> list[Entry]:
        """Those whose first step is not done."""
        return [entry for entry in self if not entry.begun]

    @property
    def rows_left(self) -> int:
        """UNet rows that all of them still need."""
        return sum(entry.rows * entry.evaluations_left for entry in self)

    def position(self, entry: Entry) -> int:
        """How many arrived earlier and wait too; 0 once it has begun."""
        return 0 if entry.begun else self.waiting.index(entry)

    def gauges(self) -> dict[str, int]:
        """The gauges of `diffuserve.stats.METRICS`."""
        waiting = [entry.rows for entry in self if not entry.begun]
        running = [entry.rows for entry in self if entry.begun]
        return {
            "requests_waiting": len(waiting),
            "requests_running": len(running),
            "rows_waiting": sum(waiting),
            "rows_running": sum(running),
        }
