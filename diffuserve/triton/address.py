"""Where a server listens."""

from __future__ import annotations

from dataclasses import dataclass

from diffuserve.serving.address import ServerAddress


@dataclass(frozen=True)
class TritonAddress(ServerAddress):
    """Where the server listens. Loopback unless told otherwise: Triton itself authenticates nobody."""

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
