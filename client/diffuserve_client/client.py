"""The client for ordinary, threaded code."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from types import TracebackType
from typing import TYPE_CHECKING

import grpc

from diffuserve.errors import Cancelled
from diffuserve.tensors import STABLE_DIFFUSION
from diffuserve_client.endpoint import Endpoint
from diffuserve_client.exchange import Event, Exchange, describing, drawing
from diffuserve_client.result import Progress, Result, result_from_events
from diffuserve_client.retries import DEFAULT_RETRIES, check_retries, retrying
from diffuserve_client.triton import Triton
from diffuserve_client.watchdog import Watchdog

if TYPE_CHECKING:
    from typing import Unpack

    from diffuserve.description import Description
    from diffuserve.request import RequestFields
    from diffuserve_client.server import Server


class Client:
    """Sends prompts to a server; one client may be used by many threads at once.

    Every request is a gRPC stream of its own, so each can be cancelled without touching the others.

    Args:
        url: HOST:PORT of the server's gRPC port; by default where `diffuserve serve` puts it.
        server: what kind of server it is, `Triton()` or `TorchServe(token)`.
        model: name of the text-to-image model.
        connect_timeout_s: seconds after which an address that does not answer counts as dead.
        idle_timeout_s: seconds of silence after which a request is cancelled; None waits forever. The server sends
            something at every step, so this is not a limit on how long a request may take.
        retries: how often a request is sent again that the server refused (`QueueFull`, `Draining`) or that found no
            server, with growing pauses and within its own timeout; see `diffuserve_client.retries`. 0 means never. What
            a server may have begun is not sent again.
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
        self._channel = grpc.insecure_channel(self._endpoint.url, options=self._endpoint.channel_options())

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; requests still running in other threads are cancelled and raise `Cancelled`."""
        self._channel.close()

    def is_ready(self) -> bool:
        """Whether the server answers and the model takes requests."""
        endpoint = self._endpoint
        try:
            answer = self._server.ask_ready(self._channel, endpoint.model, endpoint.connect_timeout_s)
            return self._server.is_ready(answer)
        except grpc.RpcError:
            return False

    def describe(self) -> Description:
        """What the server offers: its model, the fields of a request with their bounds and defaults, limits, versions.

        Raises:
            DiffuserveError: as `generate`.
        """
        [description] = self._events(describing(self._server, self._endpoint))
        return description

    def generate(
        self,
        prompt: str,
        *,
        request_id: str | None = None,
        on_progress: Callable[[Progress], object] | None = None,
        **fields: Unpack[RequestFields],
    ) -> Result:
        """Draws images and waits for them.

        Args:
            prompt: what to draw.
            request_id: what the server's log calls the request; a random one unless given.
            on_progress: called when the request is accepted (step 0) and after every step, in this thread; what it
                raises cancels the request.
            **fields: the settings, see `RequestFields`.

        Raises:
            DiffuserveError: one of `diffuserve.errors`: `InvalidRequest`, `QueueFull`, `Draining`, `DeadlineExceeded`,
                `StageFailed`, `ServerUnavailable`, and `Cancelled` if the client was closed meanwhile.
        """
        progress = on_progress is not None
        exchange = drawing(self._server, self._endpoint, prompt, fields, progress=progress, request_id=request_id)
        return result_from_events(self._events(exchange), on_progress)

    def stream(
        self,
        prompt: str,
        *,
        preview: bool | int = False,
        request_id: str | None = None,
        **fields: Unpack[RequestFields],
    ) -> Generator[Progress | Result, None, None]:
        """Yields `Progress` at step 0 and after every step, and at last the `Result`; closing it cancels the request.

        The request is sent when the first event is asked for.

        Args:
            prompt: what to draw.
            preview: k for a small image with every k-th step, True for every step.
            request_id: what the server's log calls the request; a random one unless given.
            **fields: the settings, see `RequestFields`.

        Raises:
            DiffuserveError: as `generate`.
        """
        exchange = drawing(
            self._server, self._endpoint, prompt, fields, progress=True, preview=preview, request_id=request_id
        )
        return self._events(exchange)

    def _models(self) -> Sequence[str]:
        """Those that the server has; none if it does not say."""
        try:
            answer = self._server.ask_models(self._channel, self._endpoint.connect_timeout_s)
        except grpc.RpcError:
            return ()
        return self._server.models(answer)

    def _events(self, exchange: Exchange[Event]) -> Generator[Event, None, None]:
        """Sends the request, again if need be; the last event is always among them unless an error is raised."""
        from tenacity import Retrying

        first, events = Retrying(**retrying(self._retries, exchange.timeout_s))(self._begin, exchange)
        with closing(events):
            yield first
            yield from events

    def _begin(self, exchange: Exchange[Event]) -> tuple[Event, Generator[Event, None, None]]:
        """Sends the request once and waits for its first event, after which it is never sent again."""
        events = self._send(exchange)
        return next(events), events

    def _send(self, exchange: Exchange[Event]) -> Generator[Event, None, None]:
        try:
            call = self._server.call(self._channel, exchange.begin())
        except ValueError:  # what gRPC raises for a closed channel
            raise Cancelled("The client is closed. Make a new one.") from None
        with Watchdog(self._endpoint.idle_timeout_s, call.cancel) as watchdog:
            try:
                while True:
                    with watchdog.waiting():
                        message = next(call, None)
                    if message is None:
                        break
                    event = exchange.take(message)
                    if event is not None:
                        yield event
                if exchange.model_is_unknown:
                    exchange.name_models(self._models())
                exchange.check_finished()
            except grpc.RpcError as error:
                if exchange.finished:
                    return
                if watchdog.expired:
                    raise exchange.silent() from None
                raise exchange.broken(error.code().name, error.details()) from error
            finally:
                call.cancel()
