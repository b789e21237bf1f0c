"""Every error that diffuserve raises on purpose, and how each travels.

    DiffuserveError
    ├── InvalidRequest        invalid_request      the request cannot be served as it is; nothing was started
    ├── QueueFull             queue_full           too much is waiting; `retry_after_s` says when to come back
    ├── Draining              draining             the server is shutting down and takes nothing new
    ├── DeadlineExceeded      deadline_exceeded    the request's own `timeout_ms` ran out
    ├── Cancelled             cancelled            the client went away or cancelled
    ├── StageFailed           stage_failed         an engine raised, hung or returned something unusable
    ├── ServerUnavailable     server_unavailable   no server answers at the address, or the connection broke
    ├── CheckpointError       checkpoint_error     a checkpoint cannot be exported
    ├── BundleError           bundle_error         a bundle or model repository is missing, damaged or too new
    ├── ConfigurationError    configuration_error  a server is configured with something that it does not have or allow
    └── LaunchError           launch_error         the server could not be started

Triton's status codes lack several of these, and errors on a gRPC stream arrive as text only. So a message on the wire
begins with a machine-readable code, `[queue_full retry_after_s=2.5] 64 requests are waiting ...`; `to_wire` writes it
and `from_wire` reads it back. `TRITON_CODE` is the one table from the tree to Triton's codes; the one to
HTTP's, where a server lets us choose, is in `diffuserve.http_answers`.
"""

from __future__ import annotations

import re
from typing import ClassVar


class DiffuserveError(Exception):
    """Base of the tree. The message says what came, what is allowed and how to fix it.

    `tries`: how often a client sent the request before it gave up.
    """

    code: ClassVar[str] = "error"
    tries: int = 1


class InvalidRequest(DiffuserveError):
    code = "invalid_request"


class QueueFull(DiffuserveError):
    """Refused at once instead of queued without bound; `retry_after_s` (seconds) is the server's estimate."""

    code = "queue_full"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Draining(DiffuserveError):
    code = "draining"


class DeadlineExceeded(DiffuserveError):
    code = "deadline_exceeded"


class Cancelled(DiffuserveError):
    code = "cancelled"


class StageFailed(DiffuserveError):
    code = "stage_failed"


class ServerUnavailable(DiffuserveError):
    """`never_begun`: whether it is certain that no server has begun the request; `unknown_model`: whether a server has answered
    that it has no model of that name."""

    code = "server_unavailable"

    def __init__(self, message: str, *, never_begun: bool = False, unknown_model: bool = False) -> None:
        super().__init__(message)
        self.never_begun = never_begun
        self.unknown_model = unknown_model


class CheckpointError(DiffuserveError):
    code = "checkpoint_error"


class BundleError(DiffuserveError):
    code = "bundle_error"


class ConfigurationError(DiffuserveError):
    code = "configuration_error"


class LaunchError(DiffuserveError):
    code = "launch_error"


# Triton's HTTP front end has 400, 500 and 503 for these codes, but answers all that a model says with 400: see docs/http.md.
TRITON_CODE: dict[type[DiffuserveError], str] = {
    InvalidRequest: "INVALID_ARG",
    Cancelled: "CANCELLED",
    StageFailed: "INTERNAL",
    QueueFull: "UNAVAILABLE",
    Draining: "UNAVAILABLE",
    DeadlineExceeded: "UNAVAILABLE",
}

_BY_CODE: dict[str, type[DiffuserveError]] = {cls.code: cls for cls in DiffuserveError.__subclasses__()}
_WIRE = re.compile(r"\[(?P<code>[a-z_]+)(?P<fields>(?: [a-z_]+=[^\s\]]+)*)\] (?=(?P<message>.*))", re.DOTALL)


def to_wire(error: DiffuserveError) -> str:
    """The message as it travels: `[code key=value] text`."""
    fields = f" retry_after_s={error.retry_after_s:.2g}" if isinstance(error, QueueFull) else ""
    return f"[{error.code}{fields}] {error}"


def from_wire(text: str) -> DiffuserveError | None:
    """The error that a wire message carries, or None if it carries no code of ours.

    Triton prefixes messages with words of its own, so the code may stand anywhere in the text.
    """
    for match in _WIRE.finditer(text):
        error_class = _BY_CODE.get(match["code"])
        if error_class is None:
            continue
        fields = dict(field.split("=", 1) for field in match["fields"].split())
        if error_class is QueueFull:
            return QueueFull(match["message"], retry_after_s=float(fields.get("retry_after_s", "1")))
        return error_class(match["message"])
    return None
