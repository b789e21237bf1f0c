"""Which exception each failure becomes. Triton's texts are those of version 2.51."""

import pytest

from diffuserve.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    QueueFull,
    ServerUnavailable,
    StageFailed,
)
from diffuserve_client.failures import error_from_status, error_from_text
from diffuserve_client.triton import Triton


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[deadline_exceeded] too late", DeadlineExceeded),
        ("Request for unknown model: 'nope' is not found", ServerUnavailable),
        ("Request for unknown model: 'stable_diffusion' has no available versions", ServerUnavailable),
        ("unexpected inference input 'steps' for model 'stable_diffusion'", InvalidRequest),
        (
            "[request id: abc] inference input 'priority' data-type is 'INT32', but model 'm' expects 'INT64'",
            InvalidRequest,
        ),
        ("[request id: abc] unexpected shape for input 'steps' for model 'm'. Expected [1], got [2]. ", InvalidRequest),
        ("[request id: abc] input byte size mismatch for input 'steps' for model 'm'", InvalidRequest),
        (
            "Failed to process the request(s) for model instance 'm_0', message: Stub process is not healthy",
            StageFailed,
        ),
    ],
)
def test_text(text: str, expected: type[Exception]) -> None:
    assert type(error_from_text(text, address="here:1", model="m")) is expected


def test_retry_time_survives() -> None:
    error = error_from_text("[queue_full retry_after_s=2.5] 64 are waiting", address="here:1", model="m")
    assert isinstance(error, QueueFull)
    assert error.retry_after_s == 2.5
    assert str(error) == "64 are waiting"


REFUSED = (
    "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: "
    "Failed to connect to remote host: Connection refused"
)
HUNG_UP = "failed to connect to all addresses; last error: UNAVAILABLE: ipv4:127.0.0.1:1: Socket closed"
RESET = (
    "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: recvmsg:Connection reset by peer (104)"
)
NO_NAME = "errors resolving no:1: [field:hostname lookup error:address lookup failed for no:1: Domain name not found]"


@pytest.mark.parametrize(
    ("code", "details", "heard", "expected", "words"),
    [
        (
            "UNAVAILABLE",
            REFUSED,
            False,
            ServerUnavailable,
            r"No server .* here:1 \(Connection refused\).*diffuserve serve",
        ),
        ("UNAVAILABLE", HUNG_UP, False, ServerUnavailable, r"No .* gRPC port, by default 8001, not its HTTP port"),
        ("UNAVAILABLE", RESET, False, ServerUnavailable, r"No .* gRPC port, by default 8001, not its HTTP port"),
        ("UNAVAILABLE", NO_NAME, False, ServerUnavailable, r"No server .* \(Domain name not found\)"),
        ("UNAVAILABLE", "Socket closed", False, ServerUnavailable, "broke during the request"),
        ("UNAVAILABLE", REFUSED, True, ServerUnavailable, "broke during the request"),
        ("UNIMPLEMENTED", "Method not found!", False, ServerUnavailable, "no Triton server.*8001"),
        ("RESOURCE_EXHAUSTED", "larger than max", False, InvalidRequest, "size"),
        ("CANCELLED", "", False, Cancelled, "cancelled"),
        ("INTERNAL", "[stage_failed] the unet broke", True, StageFailed, "the unet broke"),
    ],
)
def test_status(code: str, details: str, heard: bool, expected: type[Exception], words: str) -> None:
    with pytest.raises(expected, match=words):
        raise error_from_status(code, details, server=Triton(), address="here:1", heard=heard)
