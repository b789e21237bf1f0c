"""The client without a server: the same loop and engines, in this process."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Generator
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING

from diffuserve.description import Description, describe
from diffuserve.events import Event, values_from_event
from diffuserve.local_pipeline import LocalPipeline
from diffuserve.request import TextToImageRequest, request_from_fields
from diffuserve_client.fields import wire_fields
from diffuserve_client.result import Progress, Result, event_from_values, result_from_events

if TYPE_CHECKING:
    from typing import Unpack

    from diffuserve.request import RequestFields


class LocalClient:
    """`Client` on a bundle's own engines; requests of several threads share one batch, as on a server.

    Args:
        bundle: folder of an exported model.

    Raises:
        BundleError: the bundle is missing or damaged, or its engine cannot be loaded.
    """

    def __init__(self, bundle: Path) -> None:
        self._local = LocalPipeline(bundle)

    def __enter__(self) -> LocalClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops the engines; requests still running in other threads are cancelled and raise `Cancelled`."""
        self._local.close()

    def describe(self) -> Description:
        """As `Client.describe`."""
        pipeline = self._local.pipeline
        return describe(pipeline.manifest, pipeline.limits)

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
        wire = wire_fields(prompt, fields, progress=True, preview=preview)
        pipeline = self._local.pipeline
        request = request_from_fields(wire, pipeline.manifest.model, pipeline.limits)
        return self._events(request, request_id or uuid.uuid4().hex)

    def _events(self, request: TextToImageRequest, request_id: str) -> Generator[Progress | Result, None, None]:
        events: SimpleQueue[Event | Exception] = SimpleQueue()
        drawing = self._local.submit(request, events.put)
        try:
            while True:
                event = events.get()
                if isinstance(event, Exception):
                    raise event
                answer = event_from_values(values_from_event(event, request), request.format, request_id)
                if isinstance(answer, (Progress, Result)):
                    yield answer
                if isinstance(answer, Result):
                    return
        finally:
            drawing.cancel()
