"""Where Triton listens."""

from __future__ import annotations

from dataclasses import dataclass

from diffuserve.defaults import TRITON
from diffuserve.serving.address import ServerAddress


@dataclass(frozen=True)
class TritonAddress(ServerAddress):
    """Loopback unless told otherwise: Triton itself authenticates nobody."""

    host: str = "127.0.0.1"
    http_port: int = TRITON.http
    grpc_port: int = TRITON.grpc
    metrics_port: int = TRITON.metrics
