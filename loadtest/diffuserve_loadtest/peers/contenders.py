"""Who takes part: three ways to serve diffusers, and diffuserve on both of its servers."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from diffuserve.errors import LaunchError
from diffuserve.serving.process import free_ports
from diffuserve_loadtest.peers.archive import archive_with_handler
from diffuserve_loadtest.peers.environments import python_of
from diffuserve_loadtest.servers import UnderTest, started_torchserve, started_triton
from diffuserve_loadtest.target import Target

_HOST = "127.0.0.1"
_READY_TIMEOUT_S = 120.0
# What a user types to get ours.
_OURS = {
    "triton": ("diffuserve export CHECKPOINT", "diffuserve assemble BUNDLE", "diffuserve serve"),
    "torchserve": ("diffuserve export CHECKPOINT", "diffuserve archive BUNDLE", "diffuserve serve --server torchserve"),
}


@dataclass(frozen=True)
class Contender:
    """`start` makes a server of its own; `setup_lines`: lines that a user writes or types for it."""

    name: str
    start: Callable[[], AbstractContextManager[UnderTest]]
    setup_lines: int


@dataclass(frozen=True)
class Sources:
    """What contenders are made of: the same weights in three forms, the peers' folder and that of their environments."""

    checkpoint: Path
    repository: Path
    archive: Path
    peers: Path
    environments: Path


def contenders_from(sources: Sources) -> list[Contender]:
    """All five, the peers first."""

    def process(folder: str, path: str) -> Contender:
        peer = sources.peers / folder
        return Contender(folder, lambda: _process(peer, sources, path), setup_lines([peer / "server.py"]))

    handler = sources.peers / "torchserve_diffusers" / "handler.py"
    return [
        process("fastapi_lock", "/generate"),
        process("litserve", "/predict"),
        Contender("torchserve_diffusers", lambda: _torchserve(sources, handler), setup_lines([handler])),
        Contender(
            "diffuserve on TorchServe",
            lambda: started_torchserve(sources.archive, "torchserve-http"),
            len(_OURS["torchserve"]),
        ),
        Contender(
            "diffuserve on Triton", lambda: started_triton(sources.repository, "triton-http"), len(_OURS["triton"])
        ),
    ]


def setup_lines(files: list[Path]) -> int:
    """Lines that are neither empty, nor comments, nor docstrings of one line, and the requirements beside them."""
    lines = [line.strip() for file in files for line in file.read_text().splitlines()]
    requirements = files[0].with_name("requirements.txt")
    if requirements.exists():
        lines += requirements.read_text().split("\n")
    return sum(bool(line) and not line.startswith(("#", '"""')) for line in lines)


@contextlib.contextmanager
def _process(peer: Path, sources: Sources, path: str) -> Iterator[UnderTest]:
    """A peer's server.py in its own environment, in a group of its own that is killed at the end."""
    python = python_of(peer, sources.environments)
    [port] = free_ports(_HOST, 1)
    arguments = [str(python), str((peer / "server.py").absolute()), str(sources.checkpoint.absolute()), str(port)]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with (
        tempfile.TemporaryDirectory(prefix="diffuserve-peer-") as folder,
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            arguments,
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        ) as server,
    ):
        try:
            _wait_for_port(server, port, peer.name, log)
            yield UnderTest(Target("image-http", f"http://{_HOST}:{port}{path}"), pid=server.pid)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(5)
                os.killpg(server.pid, signal.SIGKILL)


def _wait_for_port(server: subprocess.Popen[bytes], port: int, name: str, log: object) -> None:
    until_s = time.monotonic() + _READY_TIMEOUT_S
    while time.monotonic() < until_s and server.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection((_HOST, port), timeout=1):
            return
        time.sleep(0.2)
    log.seek(0)  # type: ignore[attr-defined]
    words = log.read().decode(errors="replace")[-500:]  # type: ignore[attr-defined]
    raise LaunchError(f"The peer {name} did not start: {words}")


@contextlib.contextmanager
def _torchserve(sources: Sources, handler: Path) -> Iterator[UnderTest]:
    with tempfile.TemporaryDirectory(prefix="diffuserve-peer-") as name:
        archive = archive_with_handler(sources.archive, sources.checkpoint, handler, Path(name) / "diffusers.mar")
        with started_torchserve(archive, "torchserve-http") as server:
            yield server
