"""How a request travels: one transport for each protocol of `diffuserve_loadtest.target`.

They block as seen by their caller, and are made for gevent: a `gevent.Timeout` that strikes inside `send` closes the call, which
the server sees as a cancellation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from diffuserve_loadtest.plan import PlannedRequest
from diffuserve_loadtest.target import Target


@dataclass(frozen=True)
class Answer:
    """`files`: the images as they came; `size_bytes`: of the whole answer, as far as the transport knows it."""

    files: list[bytes]
    size_bytes: int


class TransportFailed(Exception):
    """An answer that carries no code of diffuserve's; `outcome` as in `Record`."""

    def __init__(self, outcome: str, message: str) -> None:
        super().__init__(message)
        self.outcome = outcome


class Transport(Protocol):
    """One connection, or as many as it needs, shared by all requests of a process."""

    def send(self, request: PlannedRequest) -> Answer:
        """Sends it and reads the answer to its end.

        Raises:
            DiffuserveError: the server's error.
            TransportFailed: another.
        """
        ...


def open_transport(target: Target, max_in_flight: int) -> Transport:
    """The transport for a target, which must be called after gevent has patched the standard library."""
    if target.protocol in ("triton-grpc", "torchserve-grpc"):
        from diffuserve_loadtest.transports.grpc import GrpcTransport

        return GrpcTransport(target)
    from diffuserve_loadtest.transports.http import HttpTransport

    return HttpTransport(target, max_in_flight)


__all__ = ["Answer", "Transport", "TransportFailed", "open_transport"]
