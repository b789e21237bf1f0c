"""A session for each size of batch, so that each goes on with the plans that it has.

ONNX Runtime plans a session's convolutions anew whenever the batch's size changes (see `BoundSession`). On an H100 that took
0.3 s for Stable Diffusion 1.5's UNet, the time of three calls of 32 rows. A session that is only ever called with one size
plans once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from diffuserve.engines.bound_session import BoundSession, padded_rows
from diffuserve.engines.example_inputs import Arrays


class SessionsByRows:
    """Calls from several threads run one after another.

    Args:
        make: makes a session, which has weights of its own.
        fits: whether there is memory for another one. Without it a size shares the session of the nearest one.
    """

    def __init__(self, make: Callable[[], BoundSession], fits: Callable[[], bool]) -> None:
        self._make, self._fits = make, fits
        self._unused: BoundSession | None = make()  # whatever keeps a session from being made is said now
        self._sessions: dict[int, BoundSession] = {}
        self._lock = threading.Lock()

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Runs the model; see `diffuserve.stages.Engine` and `BoundSession`."""
        rows = padded_rows(max((len(array) for array in inputs.values()), default=1))
        with self._lock:
            return self._session(rows)(inputs)

    def _session(self, rows: int) -> BoundSession:
        if rows not in self._sessions:
            if self._unused is not None:
                self._sessions[rows], self._unused = self._unused, None
            elif self._fits():
                self._sessions[rows] = self._make()
            else:
                nearest = min(self._sessions, key=lambda other: abs(other - rows))
                self._sessions[rows] = self._sessions[nearest]
        return self._sessions[rows]
