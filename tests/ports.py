"""Ports that nobody else is given while these tests run, neither by another worker nor by another run on this machine.

A socket that is bound and does not listen keeps each: the kernel gives it to nobody who asks for any port, connections to it are
refused, and a server that is told to may listen there, since all servers set SO_REUSEADDR.
"""

from __future__ import annotations

import contextlib
import socket

_kept: list[socket.socket] = []


def reserved_ports(host: str, count: int) -> tuple[int, ...]:
    """In place of `diffuserve.serving.process.free_ports`, which lets go of them."""
    return tuple(_reserve(host, 0) for _ in range(count))


def reserved_port() -> int:
    """On loopback."""
    return _reserve("127.0.0.1", 0)


def reserved_pair() -> int:
    """The first of two that follow each other, on loopback."""
    while True:
        first = reserved_port()
        with contextlib.suppress(OSError, OverflowError):
            _reserve("127.0.0.1", first + 1)
            return first


def _reserve(host: str, port: int) -> int:
    keeper = socket.socket()
    try:
        keeper.bind((host, port))
    except BaseException:
        keeper.close()
        raise
    keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not before, or it would share another keeper's port
    _kept.append(keeper)
    reserved: int = keeper.getsockname()[1]
    return reserved
