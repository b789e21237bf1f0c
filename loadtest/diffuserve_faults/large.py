"""Requests that are far too large."""

from __future__ import annotations

from diffuserve.errors import DiffuserveError, InvalidRequest
from diffuserve_faults import raw_http
from diffuserve_faults.case import Cases, Trial

_HUGE_BYTES = 100 * 2**20
_LARGE_BYTES = 5 * 2**20
_LARGE = 20


def send_large(trial: Trial) -> None:
    """Prompts of 100 MiB and many of 5 MiB, over HTTP and gRPC; each must be refused by name."""
    sizes = [_HUGE_BYTES, *[_LARGE_BYTES] * trial.times(_LARGE)]
    with trial.background(users=2):
        for size in sizes:
            _over_http(trial, size)
            _over_grpc(trial, size)


def _over_http(trial: Trial, size: int) -> None:
    try:
        status, answer = raw_http.generate(trial, raw_http.body_of({"prompt": "x" * size}))
    except OSError as error:
        trial.tally.lose(f"HTTP, {size >> 20} MiB: {error!r}")
        return
    if status == 400 and b"[invalid_request] prompt has" in answer:
        trial.tally.refuse(InvalidRequest.code)
    else:
        trial.tally.lose(f"HTTP, {size >> 20} MiB: {status} {answer[:200]!r}")


def _over_grpc(trial: Trial, size: int) -> None:
    with trial.client(retries=0) as client:
        try:
            client.generate("x" * size)
        except InvalidRequest:
            trial.tally.refuse(InvalidRequest.code)
        except DiffuserveError as error:
            trial.tally.lose(f"gRPC, {size >> 20} MiB: {error.code}")
        else:
            trial.tally.lose(f"gRPC, {size >> 20} MiB: an image")


CASES: Cases = {"large": ("requests of 100 MiB, and many of 5 MiB", send_large)}
