"""How a request travels: one transport for each protocol of `diffuserve_loadtest.sending.target`.

They block as seen by their caller, and are made for gevent: a `gevent.Timeout` that strikes inside `send` closes the call, which
the server sees as a cancellation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from diffuserve_loadtest.workload.plan import PlannedRequest


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
