"""A TCP proxy on loopback that can reset what goes through it."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType

from diffuserve_faults.raw_http import reset


class Proxy:
    """A context manager; `address` is where it listens."""

    def __init__(self, host: str, port: int) -> None:
        self._to = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._open = True
        self._lock = threading.Lock()  # no connection begins while they are reset
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Proxy:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open:
            self.reset()
        for thread in self._threads:
            thread.join(5)

    def reset(self) -> None:
        """Takes no more connections and resets those there are, to both sides."""
        with self._lock:
            self._open = False
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                # Data that nobody reads any more makes the kernel reset on closing, as does SO_LINGER; a thread that waits
                # in recv holds the socket open until it is woken.
                connection.shutdown(socket.SHUT_RD)
                reset(connection)

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # once it is closed
            while True:
                here, _ = self._listener.accept()
                there = socket.create_connection(self._to)
                with self._lock:
                    if not self._open:
                        reset(here)
                        reset(there)
                        return
                    self._sockets += [here, there]
                    self._start(self._pump, here, there)
                    self._start(self._pump, there, here)

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
