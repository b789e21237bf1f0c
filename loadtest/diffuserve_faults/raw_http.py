"""Triton's HTTP, by hand: for what no ordinary client would do."""

from __future__ import annotations

import http.client
import json
import socket
import struct
from collections.abc import Mapping
from typing import Any

from diffuserve_faults.case import Trial

_TIMEOUT_S = 60.0


def body_of(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields).encode()


def generate(trial: Trial, body: bytes) -> tuple[int, bytes]:
    """Status and answer of a `generate`.

    Raises:
        OSError: the connection failed, or nothing came for a minute.
        http.client.HTTPException: the answer is no HTTP.
    """
    connection = http.client.HTTPConnection("127.0.0.1", trial.address.http_port, timeout=_TIMEOUT_S)
    try:
        connection.request("POST", _path(trial, "generate"), body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def open_stream(trial: Trial, fields: Mapping[str, Any], receive_bytes: int | None = None) -> socket.socket:
    """A connection on which a `generate_stream` has been sent and nothing read; with `receive_bytes`, with so small a buffer
    for what comes."""
    connection = socket.socket()
    try:
        if receive_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.settimeout(_TIMEOUT_S)
        connection.connect(("127.0.0.1", trial.address.http_port))
        body = body_of(fields)
        head = (
            f"POST {_path(trial, 'generate_stream')} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
    except OSError:
        connection.close()
        raise
    return connection


def reset(connection: socket.socket) -> None:
    """Closes it with a TCP reset instead of a farewell."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def _path(trial: Trial, action: str) -> str:
    return f"/v2/models/{trial.model}/{action}"
