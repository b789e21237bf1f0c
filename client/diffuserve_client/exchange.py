"""One request and what comes back, whatever carries it: shared by `Client` and `AsyncClient`."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar, cast

from diffuserve.description import Description
from diffuserve.errors import DiffuserveError, ServerUnavailable
from diffuserve.wire import WIRE_VERSION
from diffuserve_client.endpoint import Endpoint
from diffuserve_client.failures import error_from_status, unknown_model
from diffuserve_client.fields import wire_fields
from diffuserve_client.result import Progress, Result
from diffuserve_client.server import Server

Event = TypeVar("Event")


class Exchange(Generic[Event]):
    """The state of one request. `begin` gives what to send; `take` turns each answer into an event.

    Args:
        server, endpoint: whom it is sent to.
        fields: values by name of `diffuserve.wire.REQUEST`.
        request_id: what the server's log calls the request; a random one unless given.

    Attributes:
        timeout_s: what the request allows itself, or None.
        finished: whether the last event has come; what happens to the call afterwards does not matter.

    Raises:
        InvalidRequest: a field's type does not fit.
    """

    def __init__(
        self, server: Server, endpoint: Endpoint, fields: Mapping[str, Any], request_id: str | None = None
    ) -> None:
        self._fields = {**fields, "wire_version": WIRE_VERSION}
        self._request_id = request_id or uuid.uuid4().hex
        self._request = server.request(endpoint.model, self._request_id, self._fields)
        timeout_ms: int | None = self._fields.get("timeout_ms")
        self.timeout_s = None if timeout_ms is None else timeout_ms / 1000
        self.finished = False
        self._error: DiffuserveError | None = None
        self._server = server
        self._endpoint = endpoint
        self._format: str = self._fields.get("format", "png")
        self._heard = False
        self._begun_s: float | None = None

    def begin(self) -> Any:
        """The message for this try. Nothing that is known of an earlier one matters any more, but that it took its time: a
        later one is given what is left of the request's own timeout."""
        self._error, self._heard = None, False
        now_s = time.monotonic()
        if self._begun_s is None:
            self._begun_s = now_s
        elif self.timeout_s is not None:
            left_ms = max(1, math.ceil(1000 * (self.timeout_s - (now_s - self._begun_s))))
            fields = {**self._fields, "timeout_ms": left_ms}
            return self._server.request(self._endpoint.model, self._request_id, fields)
        return self._request

    def take(self, message: Any) -> Event | None:
        """The event in a message, or None.

        An error is kept for `check_finished`, so that the call is read to its end: a Triton whose client hangs up on it
        while it ends a stream keeps the request, and then unloads the model only by force.
        """
        self._heard = True
        event = self._server.event(
            message,
            address=self._endpoint.url,
            model=self._endpoint.model,
            format=self._format,
            request_id=self._request_id,
        )
        if isinstance(event, DiffuserveError):
            self._error = event
            return None
        self.finished = self.finished or isinstance(event, (Result, Description))
        return cast("Event | None", event)

    def broken(self, code: str, details: str | None) -> DiffuserveError:
        """The error for a call that ended with a gRPC status other than OK."""
        return self._error or error_from_status(
            code, details or "no details", server=self._server, address=self._endpoint.url, heard=self._heard
        )

    def silent(self) -> DiffuserveError:
        """The error for a server that stopped sending."""
        return self._error or ServerUnavailable(
            f"The server at {self._endpoint.url} has sent nothing for {self._endpoint.idle_timeout_s} s, so "
            f"the request {self._request_id} was cancelled. See the server's log, or allow more with idle_timeout_s."
        )

    @property
    def model_is_unknown(self) -> bool:
        """Whether the server has no model of the name."""
        return isinstance(self._error, ServerUnavailable) and self._error.unknown_model

    def name_models(self, models: Sequence[str]) -> None:
        """Has the error then say which there are, if that is known."""
        if models:
            self._error = unknown_model(self._endpoint.url, self._endpoint.model, f". It serves: {', '.join(models)}.")

    def check_finished(self) -> None:
        """Raises the error that the server sent, or `ServerUnavailable` if it ended the call without a result."""
        if self._error is not None:
            raise self._error
        if not self.finished:
            raise ServerUnavailable(
                f"The server at {self._endpoint.url} ended the request {self._request_id} without an answer. See its log."
            )


def drawing(
    server: Server,
    endpoint: Endpoint,
    prompt: str,
    fields: Mapping[str, Any],
    *,
    progress: bool,
    preview: int = 0,
    request_id: str | None = None,
) -> Exchange[Progress | Result]:
    """A request for images. Raises `InvalidRequest` if a field's type does not fit, `TypeError` for an unknown one."""
    # Without progress there would be no sign of life to measure the silence by.
    progress = progress or endpoint.idle_timeout_s is not None
    return Exchange(server, endpoint, wire_fields(prompt, fields, progress=progress, preview=preview), request_id)


def describing(server: Server, endpoint: Endpoint) -> Exchange[Description]:
    """A request for the server's description."""
    return Exchange(server, endpoint, {"describe": True})
