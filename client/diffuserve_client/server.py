"""What `Client` and `AsyncClient` need to know of a kind of server. The calls are the same for both, since gRPC's channels
for threads and for asyncio take the same arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from diffuserve.description import Description
from diffuserve.errors import DiffuserveError
from diffuserve_client.result import Progress, Result


class Server(Protocol):
    """One kind of server, such as `diffuserve_client.triton.Triton`."""

    @property
    def name(self) -> str:
        """In messages."""
        ...

    @property
    def default_url(self) -> str:
        """HOST:PORT of its gRPC port where it has been started without options."""
        ...

    def request(self, model: str, request_id: str, fields: Mapping[str, Any]) -> Any:
        """The message that asks for images; raises InvalidRequest if a value does not fit.

        Args:
            model: the model's name.
            request_id: what the server's log will call the request, if it can.
            fields: values by name of `diffuserve.wire.REQUEST`, in Python's types; only those to be sent.
        """
        ...

    def call(self, channel: Any, request: Any) -> Any:
        """Sends it; the call whose messages are read."""
        ...

    def event(
        self, message: Any, *, address: str, model: str, format: str, request_id: str
    ) -> Progress | Result | Description | DiffuserveError | None:
        """What one message says, or None if only that the server is alive; raises StageFailed if it is not an answer of
        diffuserve's."""
        ...

    def ask_ready(self, channel: Any, model: str, timeout_s: float) -> Any:
        """Asks whether the model takes requests; the answer, or with asyncio what it is awaited from."""
        ...

    def is_ready(self, answer: Any) -> bool:
        """What the answer says."""
        ...

    def ask_models(self, channel: Any, timeout_s: float) -> Any:
        """Asks which models there are, as `ask_ready` does; None if this kind of server tells nobody."""
        ...

    def models(self, answer: Any) -> Sequence[str]:
        """Those that take requests, sorted."""
        ...
