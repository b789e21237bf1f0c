"""What a UNet call costs by its number of rows, as measured, and the batch that is worth most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


class CallCosts:
    """Seconds of one UNet call by rows, linear between the measured numbers and beyond the last.

    Args:
        seconds_by_rows: measured; empty means that cost grows with neither more nor less than the rows, so that the
            largest batch is taken.
    """

    def __init__(self, seconds_by_rows: Mapping[int, float]) -> None:
        measured = sorted(seconds_by_rows.items())
        self._rows = np.array([0, *(rows for rows, _ in measured)], float)
        self._seconds = np.array([0, *(seconds for _, seconds in measured)], float)

    def seconds(self, rows: int) -> float:
        """The cost of a call, interpolated; proportional beyond what was measured."""
        if len(self._rows) == 1:
            return float(rows)
        if rows > self._rows[-1]:
            return float(rows * self._seconds[-1] / self._rows[-1])
        return float(np.interp(rows, self._rows, self._seconds))

    def best(self, candidates: Sequence[int]) -> int:
        """The number of rows that gives most rows per second; the larger of two that give the same.

        Throughput within a twentieth of the best counts as the same: so much is noise, and more rows per call means that
        more requests advance, and that what a call costs besides the engine is paid less often.
        """
        rates = [rows / self.seconds(rows) for rows in candidates]
        enough = 0.95 * max(rates)
        return max(rows for rows, rate in zip(candidates, rates, strict=True) if rate >= enough)
