"""A pipeline on a bundle's own engines in this process, for callers that are not asynchronous: the event loop runs in a
thread of its own, and requests of several callers share one batch, as on a server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from diffuserve.bundle.manifest import read_manifest
from diffuserve.engines.local_stages import LoadEngines, LocalStages
from diffuserve.engines.tensorrt_profiles import check_limits
from diffuserve.errors import Cancelled
from diffuserve.events import Event
from diffuserve.limits import Limits
from diffuserve.pipeline import Pipeline
from diffuserve.request import TextToImageRequest
from diffuserve.serving_options import Serving


class LocalPipeline:
    """Args:
        bundle: folder of an exported model.
        limits, serving: as in `diffuserve.pipeline.Pipeline`.
        load: as in `diffuserve.engines.local_stages.LocalStages`.

    Raises:
        BundleError: the bundle is missing or damaged, or its engine cannot be loaded.
        ConfigurationError: the limits allow what the bundle's TensorRT plans were not built for.
    """

    def __init__(
        self,
        bundle: Path,
        limits: Limits | None = None,
        serving: Serving | None = None,
        *,
        load: LoadEngines | None = None,
    ) -> None:
        manifest = read_manifest(bundle)
        limits = limits or Limits.for_model(manifest.model)
        check_limits(limits, manifest)
        self._stages = LocalStages(bundle, load=load)
        self.pipeline = Pipeline(bundle, self._stages, limits, serving)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="diffuserve-local", daemon=True)
        self._thread.start()

    def warm(self) -> None:
        """As `LocalStages.warm`; before the first request."""
        self._stages.warm()

    def submit(self, request: TextToImageRequest, deliver: Callable[[Event | Exception], object]) -> Future[None]:
        """Starts a request. Cancelling what is returned frees its rows at the next step.

        Args:
            request: checked against the pipeline's limits.
            deliver: called in the loop's thread with every event; the last is `Completed` or an exception.

        Raises:
            Cancelled: the pipeline is closed.
        """
        with self._lock:
            if self._closed:
                raise Cancelled("The pipeline is closed. Make a new one.")
            return asyncio.run_coroutine_threadsafe(self._draw(request, deliver), self._loop)

    def close(self) -> None:
        """Stops the engines; requests that still run end with `Cancelled`. Can be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._stages.close()

    async def _draw(self, request: TextToImageRequest, deliver: Callable[[Event | Exception], object]) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("_draw runs as a task only")
        self._tasks.add(task)
        try:
            async for event in self.pipeline.generate(request):
                deliver(event)
        except asyncio.CancelledError:
            deliver(Cancelled("The request was cancelled: the pipeline was closed."))
            raise
        except Exception as error:
            deliver(error)
        finally:
            self._tasks.discard(task)

    async def _stop(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.pipeline.close()
