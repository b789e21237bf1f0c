"""The client without a server: the same loop and engines, in this process."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable, Generator
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any

from diffuserve.engines.local import LocalStages
from diffuserve.errors import Cancelled, StageFailed
from diffuserve.pipeline import Accepted, Event, Pipeline
from diffuserve.pipeline import Progress as StepDone
from diffuserve.request import TextToImageRequest, request_from_fields
from diffuserve_client.fields import tensor_fields
from diffuserve_client.result import Progress, Result, result_from_events

if TYPE_CHECKING:
    from typing import Unpack

    from diffuserve_client.fields import RequestFields


class LocalClient:
    """`Client` on a bundle's own engines; requests of several threads share one batch, as on a server.

    Args:
        bundle: folder of an exported model.

    Raises:
        BundleError: the bundle is missing or damaged, or its engine cannot be loaded.
    """

    def __init__(self, bundle: Path) -> None:
        self._stages = LocalStages(bundle)
        self._pipeline = Pipeline(bundle, self._stages)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="diffuserve-local", daemon=True)
        self._thread.start()

    def __enter__(self) -> LocalClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops the engines; requests still running in other threads are cancelled and raise `Cancelled`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._stages.close()

    def generate(
        self,
        prompt: str,
        *,
        request_id: str | None = None,
        on_progress: Callable[[Progress], object] | None = None,
        **fields: Unpack[RequestFields],
    ) -> Result:
        """As `Client.generate`."""
        return result_from_events(self.stream(prompt, request_id=request_id, **fields), on_progress)

    def stream(
        self,
        prompt: str,
        *,
        preview: bool | int = False,
        request_id: str | None = None,
        **fields: Unpack[RequestFields],
    ) -> Generator[Progress | Result, None, None]:
        """As `Client.stream`."""
        tensors = tensor_fields(prompt, fields, progress=True, preview=preview)
        request = request_from_fields(tensors, self._pipeline.manifest.model, self._pipeline.limits)
        return self._events(request, request_id or uuid.uuid4().hex)

    def _events(self, request: TextToImageRequest, request_id: str) -> Generator[Progress | Result, None, None]:
        events: SimpleQueue[Event | Exception] = SimpleQueue()
        with self._lock:
            if self._closed:
                raise Cancelled("The client is closed. Make a new one.")
            drawing = asyncio.run_coroutine_threadsafe(self._draw(request, events.put), self._loop)
        try:
            while True:
                event = events.get()
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Accepted):
                    yield Progress(0, event.steps, position=event.position)
                elif isinstance(event, StepDone):
                    yield Progress(event.step, event.steps, eta_s=event.eta_s, encoded_previews=list(event.previews))
                else:
                    yield Result(
                        encoded=list(event.images),
                        format=request.format,
                        flagged=list(event.flagged),
                        seeds=list(event.seeds),
                        width=request.width,
                        height=request.height,
                        parameters=list(event.parameters),
                        warnings=list(event.warnings),
                        queue_s=event.queue_s,
                        denoise_s=event.denoise_s,
                        total_s=event.total_s,
                        request_id=request_id,
                    )
                    return
        finally:
            drawing.cancel()

    async def _draw(self, request: TextToImageRequest, deliver: Callable[[Event | Exception], None]) -> None:
        """Runs in the loop's thread; the last thing delivered is `Completed` or an exception."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("_draw runs as a task only")
        self._tasks.add(task)
        try:
            async for event in self._pipeline.generate(request):
                deliver(event)
            deliver(StageFailed("The pipeline ended without an image."))
        except asyncio.CancelledError:
            deliver(Cancelled("The request was cancelled: the client was closed."))
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
        await self._pipeline.close()
