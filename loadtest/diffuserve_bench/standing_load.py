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
        ServerNotFull: not all of them had come in time.
        GeneratorFailed, RequestsFailed: as `generating`.
    """
    arrivals = workload.arrivals
    assert isinstance(arrivals, Closed)  # noqa: S101 - for the type checker
    with generating(workload, Target("triton-grpc", server.address.grpc)):
        give_up_s = time.monotonic() + _STARTS_WITHIN_S + arrivals.ramp_s
        while (requests := _requests_at(server)) < arrivals.users:
            if time.monotonic() > give_up_s:
                raise ServerNotFull(f"Of {arrivals.users} requests only {requests:g} had come to the server in time.")
            time.sleep(_LOOK_EVERY_S)
        yield


def _requests_at(server: TritonServer) -> float:
    metrics = read_metrics(server.address.metrics)
    return metrics["requests_waiting"] + metrics["requests_running"]
