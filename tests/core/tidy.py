"""Runs a coroutine that has to leave nothing behind, by a clock that stands still."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any

from tests.clocks import Clock, run_by


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Fails if an exception was never retrieved or a task was left behind. No timeout passes but by
    `tests.clocks.running_clock`."""
    noise: list[dict[str, Any]] = []

    async def quiet() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: noise.append(context))
        await main()
        gc.collect()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    gc.freeze()  # or each collection would look through all that has been imported
    try:
        run_by(Clock(), quiet())
        gc.collect()
    finally:
        gc.unfreeze()
    assert noise == []
