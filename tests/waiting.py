"""Waiting for what another process or thread does, however long it takes there."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")

LONG_S = 120.0
"""Longer than anything here takes on the slowest machine: only what is broken takes as long."""
_LOOK_EVERY_S = 0.02


def wait_until(true: Callable[[], object]) -> None:
    """Returns once `true()` is."""
    end_s = time.monotonic() + LONG_S
    while not true():
        assert time.monotonic() < end_s, "what is waited for has not come"
        time.sleep(_LOOK_EVERY_S)


def wait_for(expected: Value, read: Callable[[], Value]) -> None:
    """Returns once `read()` gives what is expected, such as a counter that is brought up to date at intervals."""
    end_s = time.monotonic() + LONG_S
    while (found := read()) != expected:
        assert time.monotonic() < end_s, f"{found!r}, where {expected!r} was waited for"
        time.sleep(_LOOK_EVERY_S)
