"""Requests that keep a server full while something else is measured."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from diffuserve.errors import DiffuserveError
from diffuserve.triton.launcher import TritonServer
from diffuserve_loadtest.sending.generator import generating
from diffuserve_loadtest.sending.target import Target
from diffuserve_loadtest.server.metrics import read_metrics
from diffuserve_loadtest.workload.arrivals import Closed
from diffuserve_loadtest.workload.workload import Workload

_LOOK_EVERY_S = 0.1
_STARTS_WITHIN_S = 60.0


class ServerNotFull(DiffuserveError):
    """The load did not reach the server."""

    code = "server_not_full"


@contextlib.contextmanager
def standing_load(server: TritonServer, workload: Workload) -> Iterator[None]:
    """The block begins when all users of a closed loop have a request with the server; at its end they are hung up on.

    Args:
        server: nobody else sends it requests meanwhile.
        workload: a closed loop that outlasts the block.

    Raises:
        ServerNotFull: they never had, within a minute after the last one was to begin.
        GeneratorFailed, RequestsFailed: as `generating`.
    """
    assert isinstance(workload.arrivals, Closed)  # noqa: S101 - for the type checker
    users = workload.arrivals.users
    with generating(workload, Target("triton-grpc", server.address.grpc)):
        full = _wait_until(server, users, _STARTS_WITHIN_S + workload.arrivals.ramp_s)
        if full:
            yield
    if not full:
        raise ServerNotFull(f"The server never had {users} requests at once. Ask for fewer in flight, or longer ones.")


def _wait_until(server: TritonServer, requests: int, limit_s: float) -> bool:
    """Whether so many have come within the limit."""
    give_up_s = time.monotonic() + limit_s
    while time.monotonic() < give_up_s:
        metrics = read_metrics(server.address.metrics)
        if metrics["requests_waiting"] + metrics["requests_running"] >= requests:
            return True
        time.sleep(_LOOK_EVERY_S)
    return False
