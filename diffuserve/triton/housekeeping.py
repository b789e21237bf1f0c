"""What the in-flight model does beside its event loop: notice cancelled clients, drain when asked, report metrics.

All three are blocking round trips to Triton's process or to the disk, so one thread does them for all requests, at
intervals, and hands what it finds to the event loop.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Callable
from typing import Any

from diffuserve.pipeline import Pipeline
from diffuserve.serving.lifecycle import ModelSigns
from diffuserve.triton.metrics import Metrics

log = logging.getLogger(__name__)

INTERVAL_S = 0.05


class Housekeeping:
    """A thread that runs until `stop`.

    Args:
        pipeline: whose counts are reported, and which is told to drain.
        is_idle: whether every request has had its last response and every call to another model has returned, so that
            Triton can be stopped.
        model_name: the label of its metrics.
        signs: by which it is asked to drain, and reports that it has; None without a launcher.
    """

    def __init__(
        self, pipeline: Pipeline, is_idle: Callable[[], bool], model_name: str, signs: ModelSigns | None
    ) -> None:
        self._pipeline = pipeline
        self._is_idle = is_idle
        self._was_idle = False
        self._metrics = Metrics(model_name)
        self._signs = signs
        self._watched: dict[int, tuple[Any, asyncio.Task[Any], asyncio.AbstractEventLoop]] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="housekeeping", daemon=True)
        self._thread.start()

    def watch(self, sender: Any, task: asyncio.Task[Any]) -> None:
        """Cancels `task` when the client of `sender` has gone or cancelled. Call it on the event loop."""
        loop = asyncio.get_running_loop()
        self._watched[id(sender)] = (sender, task, loop)

    def unwatch(self, sender: Any) -> None:
        """After this returns, `sender` is not touched any more. It may wait for one round trip, unless it was never
        watched."""
        if id(sender) not in self._watched:
            return
        with self._lock:
            self._watched.pop(id(sender), None)

    def stop(self) -> None:
        """Ends the thread. While Triton unloads the model it may no longer answer the thread's last call, so that is not
        waited for."""
        self._stopped.set()
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        while not self._stopped.wait(INTERVAL_S):
            try:
                self._cancel_gone_clients()
                self._metrics.update(self._pipeline)
                self._drain_if_asked()
            except Exception:
                log.exception("housekeeping failed; it goes on")

    def _cancel_gone_clients(self) -> None:
        for key in list(self._watched):
            # Taken for each sender alone, so that `unwatch` waits for one round trip at most.
            with self._lock:
                if key not in self._watched:
                    continue
                sender, task, loop = self._watched[key]
                if sender.is_cancelled():
                    del self._watched[key]
                    loop.call_soon_threadsafe(task.cancel)

    def _drain_if_asked(self) -> None:
        if self._signs is None or not self._signs.drain_requested:
            return
        self._pipeline.drain()
        # Twice in a row, since a request that has just been answered may still be on its way out of `execute`.
        was_idle, self._was_idle = self._was_idle, self._is_idle()
        if was_idle and self._was_idle:
            gc.collect()  # Triton's objects that some reference cycle still holds; see StableDiffusionModel._answer
            # The launcher stops Triton now, and a call that Triton does not answer any more would hold the model's end up.
            self._stopped.set()
            self._signs.report_drained()
