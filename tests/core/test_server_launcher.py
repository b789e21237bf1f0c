"""What all launchers share, on a server of a few lines."""

from __future__ import annotations

import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from diffuserve.errors import LaunchError
from diffuserve.serving.address import ServerAddress
from diffuserve.serving.launcher import Served, ServerLauncher
from diffuserve.serving.process import ServerProcess, accepts_connections

LISTENS = """
import socket, sys
print("about to listen", flush=True)
with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as server:
    while True:
        server.accept()[0].close()
"""
GIVES_UP = "print('the disk is full')"
SLEEPS = "import time; time.sleep(600)"


class Listener(ServerLauncher[ServerAddress]):
    name = "Listener"

    def __init__(
        self, program: str = LISTENS, address: ServerAddress | None = None, ready_timeout_s: float = 60.0
    ) -> None:
        address = address or ServerAddress.on_free_ports()
        super().__init__(address, log_level="error", ready_timeout_s=ready_timeout_s)
        self.program = program
        self.complaint = ""
        self.idle = threading.Event()
        self.run_folder: Path | None = None
        self.cleaned_up = 0

    @property
    def served(self) -> tuple[Served, ...]:
        raise NotImplementedError

    def _start(self, run_folder: Path) -> ServerProcess:
        self.run_folder = run_folder
        (run_folder / "file").touch()
        command = [sys.executable, "-c", self.program, str(self.address.http_port)]
        return ServerProcess(self.name, command, {}, folder=run_folder, show=lambda line: False)

    def _is_ready(self, process: ServerProcess) -> bool:
        return accepts_connections("127.0.0.1", self.address.http_port)

    def _has_failed(self, process: ServerProcess) -> str:
        return self.complaint

    def _is_drained(self, asked_s: float) -> bool:
        assert self._drain_request.made
        assert asked_s <= time.monotonic()
        return self.idle.is_set()

    @property
    def _stop_timeout_s(self) -> float:
        return 10.0

    def _clean_up(self) -> None:
        self.cleaned_up += 1


def left_nothing(server: Listener) -> bool:
    return (
        server.run_folder is not None
        and not server.run_folder.exists()
        and not server.running
        and server.cleaned_up > 0
        and not accepts_connections("127.0.0.1", server.address.http_port)
    )


def test_a_server_runs_while_its_context_lasts() -> None:
    server = Listener()
    with pytest.raises(LaunchError, match="Listener has not been started"):
        _ = server.pid
    server.idle.set()
    with server as entered:
        assert entered is server
        assert server.running
        assert Path(f"/proc/{server.pid}").exists()
        assert accepts_connections("127.0.0.1", server.address.http_port)
    assert left_nothing(server)
    server.stop()
    assert server.failure is None


@pytest.mark.parametrize(
    ("program", "ready_timeout_s", "message"),
    [
        (GIVES_UP, 60, "Listener stopped while it was starting. Its last words: the disk is full"),
        (SLEEPS, 0.2, r"Listener was not ready within 0\.2 s"),
    ],
)
def test_a_start_that_fails_leaves_nothing(program: str, ready_timeout_s: float, message: str) -> None:
    server = Listener(program, ready_timeout_s=ready_timeout_s)
    with pytest.raises(LaunchError, match=message), server:
        pass
    assert left_nothing(server)


@pytest.mark.parametrize("kind", ["http", "grpc", "metrics"])
def test_a_port_in_use_is_named_before_anything_is_made(kind: str) -> None:
    free = ServerAddress.on_free_ports()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = {"http": free.http_port, "grpc": free.grpc_port, "metrics": free.metrics_port}
        ports[kind] = taken.getsockname()[1]
        server = Listener(address=ServerAddress("127.0.0.1", ports["http"], ports["grpc"], ports["metrics"]))
        with pytest.raises(LaunchError, match=rf"Port {ports[kind]} .* cannot be used .*--{kind}-port PORT"), server:
            pass
    assert server.run_folder is None


def test_a_server_that_has_failed_is_ended_and_says_why() -> None:
    with Listener() as server:
        server.complaint = "It has lost its mind, so it was ended."
        while server.running:
            time.sleep(0.01)
        # The reason is there before the process ends.
        assert server.failure == server.complaint
        assert server.drain(60) is False  # there is nothing left to wait for
    assert left_nothing(server)


def test_draining_waits_until_all_is_answered_or_nobody_waits_any_more() -> None:
    with Listener() as server:
        assert server.drain(0.1) is False
        give_up = threading.Event()
        give_up.set()
        assert server.drain(3600, give_up) is False
        threading.Timer(0.1, server.idle.set).start()
        assert server.drain(3600) is True
    assert left_nothing(server)
