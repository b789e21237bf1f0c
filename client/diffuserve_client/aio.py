"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from diffuserve.errors import Cancelled, StageFailed
from diffuserve.tensors import STABLE_DIFFUSION
from diffuserve_client.endpoint import Endpoint
from diffuserve_client.exchange import Event, Exchange, describing, drawing
from diffuserve_client.result import Progress, Result
from diffuserve_client.retries import DEFAULT_RETRIES, check_retries, retrying
from diffuserve_client.triton import Triton

if TYPE_CHECKING:
    from typing import Unpack

    from diffuserve.description import Description
    from diffuserve.request import RequestFields
    from diffuserve_client.server import Server


class AsyncClient:
    """`Client` for asyncio: the same arguments and methods. Cancelling a task cancels its request on the server.

    It belongs to the event loop in which it is first used.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        server: Server | None = None,
        model: str = STABLE_DIFFUSION,
        connect_timeout_s: float = 1.0,
        idle_timeout_s: float | None = 120.0,
        retries: int = DEFAULT_RETRIES,
    ) -> None:
        self._retries = check_retries(retries)
        self._server = server or Triton()
        self._endpoint = Endpoint(
            self._server.default_url if url is None else url, model, connect_timeout_s, idle_timeout_s
        )
        self._channel: grpc.aio.Channel | None = None
        self._closed = False

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection; tasks whose requests still run are cancelled."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    def _open_channel(self) -> grpc.aio.Channel:
        if self._closed:
            raise Cancelled("The client is closed. Make a new one.")
        if self._channel is None:  # made here, since a channel keeps the event loop that it was made in
            self._channel = grpc.aio.insecure_channel(self._endpoint.url, options=self._endpoint.channel_options())
        return self._channel

    async def is_ready(self) -> bool:
        """Whether the server answers and the model takes requests."""
        endpoint = self._endpoint
        try:
            answer = await self._server.ask_ready(self._open_channel(), endpoint.model, endpoint.connect_timeout_s)
        except grpc.RpcError:
            return False
        return self._server.is_ready(answer)

    async def describe(self) -> Description:
        """As `Client.describe`."""
        [description] = [event async for event in self._events(describing(self._server, self._endpoint))]
        return description

    async def generate(
        self,
        prompt: str,
        *,
        request_id: str | None = None,
        on_progress: Callable[[Progress], object] | None = None,
        **fields: Unpack[RequestFields],
    ) -> Result:
        """As `Client.generate`."""
        progress = on_progress is not None
        exchange = drawing(self._server, self._endpoint, prompt, fields, progress=progress, request_id=request_id)
        result: Result | None = None
        async with aclosing(self._events(exchange)) as events:
            async for event in events:
                if isinstance(event, Result):
                    result = event
                elif on_progress is not None:
                    on_progress(event)
        if result is None:
            raise StageFailed("The request ended without an image.")
        return result

    def stream(
        self,
        prompt: str,
        *,
        preview: bool | int = False,
        request_id: str | None = None,
        **fields: Unpack[RequestFields],
    ) -> AsyncGenerator[Progress | Result, None]:
        """As `Client.stream`. To leave early, close it: `async with contextlib.aclosing(client.stream(...))`."""
        exchange = drawing(
            self._server, self._endpoint, prompt, fields, progress=True, preview=preview, request_id=request_id
        )
        return self._events(exchange)

    async def _models(self) -> Sequence[str]:
        """As `Client._models`."""
        asked = self._server.ask_models(self._open_channel(), self._endpoint.connect_timeout_s)
        try:
            answer = None if asked is None else await asked
        except grpc.RpcError:
            return ()
        return self._server.models(answer)

    async def _events(self, exchange: Exchange[Event]) -> AsyncGenerator[Event, None]:
        """Sends the request, again if need be; the last event is always among them unless an error is raised."""
        from tenacity import AsyncRetrying

        attempts = AsyncRetrying(**retrying(self._retries, exchange.timeout_s))
        first, events = await attempts.wraps(self._begin)(exchange)
        async with aclosing(events):
            yield first
            async for event in events:
                yield event

    async def _begin(self, exchange: Exchange[Event]) -> tuple[Event, AsyncGenerator[Event, None]]:
        """Sends the request once and waits for its first event, after which it is never sent again."""
        events = self._send(exchange)
        return await anext(events), events

    async def _send(self, exchange: Exchange[Event]) -> AsyncGenerator[Event, None]:
        call = self._server.call(self._open_channel(), exchange.begin())
        try:
            while True:
                message = await asyncio.wait_for(call.read(), self._endpoint.idle_timeout_s)
                if message is grpc.aio.EOF:
                    break
                event = exchange.take(message)
                if event is not None:
                    yield event
            if exchange.model_is_unknown:
                exchange.name_models(await self._models())
            exchange.check_finished()
        except TimeoutError:
            if not exchange.finished:
                raise exchange.silent() from None
        except grpc.RpcError as error:
            if not exchange.finished:
                raise exchange.broken(error.code().name, error.details()) from error
        finally:
            call.cancel()
