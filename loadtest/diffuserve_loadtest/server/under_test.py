"""The server under test: one that runs already, or one that is started for the run."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffuserve.tensors import STABLE_DIFFUSION
from diffuserve_loadtest.sending.target import Protocol, Target
from diffuserve_loadtest.server.metrics import read_metrics

_LOOK_EVERY_S = 0.25


@dataclass(frozen=True)
class UnderTest:
    """`pid` and `metrics_url`: as `Watch` takes them; `key_file`: TorchServe's; `max_rows`: of a UNet call, None if unknown."""

    target: Target
    metrics_url: str | None = None
    pid: int | None = None
    key_file: Path | None = None
    max_rows: int | None = None

    def wait_until_idle(self, limit_s: float = 60.0) -> None:
        """Until no request waits or runs, which a server without metrics cannot say; `limit_s` at most."""
        give_up_s = time.monotonic() + limit_s
        while self.metrics_url is not None and time.monotonic() < give_up_s:
            try:
                metrics = read_metrics(self.metrics_url, self.target.model)
            except OSError:
                return
            if not metrics.get("requests_waiting", 0) + metrics.get("requests_running", 0):
                return
            time.sleep(_LOOK_EVERY_S)


@contextlib.contextmanager
def started_triton(repository: Path, protocol: Protocol, model: str = STABLE_DIFFUSION) -> Iterator[UnderTest]:
    """Triton on free ports of loopback; raises as `TritonServer`, and LaunchError if it has no such model."""
    from diffuserve.triton.address import TritonAddress
    from diffuserve.triton.configuration import read_options
    from diffuserve.triton.launcher import TritonServer
    from diffuserve.triton.repository import check_serves

    check_serves(repository, model)
    with TritonServer(repository, TritonAddress.on_free_ports()) as server:
        url = server.address.grpc if protocol == "triton-grpc" else server.address.http
        max_rows = read_options(repository, model)[0].max_rows
        yield UnderTest(Target(protocol, url, model=model), server.address.metrics, server.pid, max_rows=max_rows)


@contextlib.contextmanager
def started_torchserve(archive: Path, protocol: Protocol) -> Iterator[UnderTest]:
    """TorchServe on free ports of loopback; raises as `TorchServeServer`."""
    from diffuserve.torchserve.address import TorchServeAddress
    from diffuserve.torchserve.launcher import TorchServeServer

    with tempfile.TemporaryDirectory(prefix="diffuserve-keys-") as name:
        key_file = Path(name) / "keys.json"
        with TorchServeServer(archive, TorchServeAddress.on_free_ports(), key_file=key_file) as server:
            url = server.address.grpc if protocol == "torchserve-grpc" else server.address.http
            yield UnderTest(Target(protocol, url), server.address.metrics, server.pid, key_file)
