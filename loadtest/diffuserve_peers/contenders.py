"""Who takes part: three ways to serve diffusers, and diffuserve on both of its servers."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from diffuserve.serving.process import ServerProcess, free_ports
from diffuserve_loadtest.sending.target import Target
from diffuserve_loadtest.server.archives import archive_with_handler
from diffuserve_loadtest.server.repositories import repository_with
from diffuserve_loadtest.server.under_test import UnderTest, started_torchserve, started_triton
from diffuserve_peers.environments import python_of

_HOST = "127.0.0.1"
_READY_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 5.0
# What a user types, from an empty virtual environment to a server that answers.
_PROCESS_COMMANDS = ("pip install -r requirements.txt", "python server.py CHECKPOINT PORT")
_TORCHSERVE_COMMANDS = (
    "pip install -r requirements.txt",
    "torch-model-archiver --model-name NAME --version 1 --handler handler.py --extra-files CHECKPOINT "
    "--config-file model-config.yaml --export-path STORE",
    "torchserve --start --model-store STORE --models NAME.mar",
)
_OURS_ON_TRITON = (
    "pip install 'diffuserve[export,serve]'",
    "diffuserve export CHECKPOINT",
    "diffuserve assemble BUNDLE",
    "diffuserve serve",
)
_OURS_ON_TORCHSERVE = (
    "pip install 'diffuserve[export,torchserve]'",
    "diffuserve export CHECKPOINT",
    "diffuserve archive BUNDLE",
    "diffuserve serve --server torchserve",
)


@dataclass(frozen=True)
class Contender:
    """A way to serve the checkpoint.

    Attributes:
        name: in the table.
        start: makes a server of its own, which ends with the context.
        setup_lines: that a user writes or types for it.
        control: no way that anybody would choose, but one that shows what a difference comes from; takes part when named.
    """

    name: str
    start: Callable[[], AbstractContextManager[UnderTest]]
    setup_lines: int
    control: bool = False


@dataclass(frozen=True)
class Sources:
    """What contenders are made of: the same weights in three forms, the peers' folder and that of their environments."""

    checkpoint: Path
    repository: Path
    archive: Path
    peers: Path
    environments: Path


def contenders_from(sources: Sources) -> list[Contender]:
    """The peers first, then ours, then the controls."""
    torchserve = sources.peers / "torchserve_diffusers"
    return [
        _peer("fastapi_lock", "/generate", sources),
        _peer("litserve", "/predict", sources),
        Contender(
            torchserve.name, lambda: _torchserve(torchserve, sources), setup_lines(torchserve, _TORCHSERVE_COMMANDS)
        ),
        Contender(
            "diffuserve_torchserve",
            lambda: started_torchserve(sources.archive, "torchserve-http"),
            len(_OURS_ON_TORCHSERVE),
        ),
        Contender("diffuserve_triton", lambda: started_triton(sources.repository, "triton-http"), len(_OURS_ON_TRITON)),
        *(
            Contender(
                f"diffuserve_triton_{batching}",
                lambda batching=batching: _triton_with(batching, sources),  # type: ignore[misc]
                len(_OURS_ON_TRITON),
                control=True,
            )
            for batching in ("none", "request")
        ),
    ]


def setup_lines(peer: Path, commands: Sequence[str]) -> int:
    """Commands, and lines of a peer's files that are neither empty, nor comments, nor docstrings of one line; its README
    does not count."""
    files = [path for path in peer.iterdir() if path.suffix in (".py", ".txt", ".yaml")]
    lines = [line.strip() for file in files for line in file.read_text().splitlines()]
    return len(commands) + sum(bool(line) and not line.startswith(("#", '"""')) for line in lines)


def _peer(folder: str, path: str, sources: Sources) -> Contender:
    peer = sources.peers / folder
    return Contender(folder, lambda: _process(peer, path, sources), setup_lines(peer, _PROCESS_COMMANDS))


@contextlib.contextmanager
def _process(peer: Path, path: str, sources: Sources) -> Iterator[UnderTest]:
    """A peer's server.py in its own environment."""
    python = python_of(peer, sources.environments)
    [port] = free_ports(_HOST, 1)
    command = [str(python), str((peer / "server.py").absolute()), str(sources.checkpoint.absolute()), str(port)]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with tempfile.TemporaryDirectory(prefix="diffuserve-peer-") as folder:
        environment["TMPDIR"] = folder  # multiprocessing leaves a folder when its process is ended
        server = ServerProcess(
            f"The peer {peer.name}", command, environment, folder=Path(folder), show=lambda line: False
        )
        try:
            server.wait_until(lambda: _listens(port), _READY_TIMEOUT_S)
            yield UnderTest(Target("image-http", f"http://{_HOST}:{port}{path}"), pid=server.pid)
        finally:
            _end_all(server)
            server.stop(_STOP_TIMEOUT_S)


def _end_all(server: ServerProcess) -> None:
    """Asks every process of the peer to end and waits: Python's multiprocessing removes its semaphores once all have."""
    end_s = time.monotonic() + _STOP_TIMEOUT_S
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
        while time.monotonic() < end_s:
            if not server.running:
                os.killpg(server.pid, 0)  # raises when none is left
            time.sleep(0.05)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((_HOST, port), timeout=1):
        return True
    return False


@contextlib.contextmanager
def _torchserve(peer: Path, sources: Sources) -> Iterator[UnderTest]:
    """By our launcher, in the environment that this runs in, which has what requirements.txt asks for."""
    with tempfile.TemporaryDirectory(prefix="diffuserve-peer-") as name:
        path = Path(name) / "diffusers.mar"
        archive = archive_with_handler(sources.archive, sources.checkpoint, peer / "handler.py", path)
        with started_torchserve(archive, "torchserve-http") as server:
            yield server


@contextlib.contextmanager
def _triton_with(batching: str, sources: Sources) -> Iterator[UnderTest]:
    """Ours with the batching of others: the same engine and the same server."""
    # Beside the repository, where its big files can be linked.
    parent = sources.repository.absolute().parent
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=parent) as name:
        repository = repository_with(sources.repository, Path(name) / "repository", {"batching": batching})
        with started_triton(repository, "triton-http") as server:
            yield server
