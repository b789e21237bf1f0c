"""Where a server listens, whichever it is."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

from diffuserve.serving.process import free_ports


@dataclass(frozen=True)
class ServerAddress:
    """A host, and after it nothing but ports, for which each server has its own defaults."""

    host: str
    http_port: int
    grpc_port: int
    metrics_port: int

    @property
    def http(self) -> str:
        return f"http://{self.host}:{self.http_port}"

    @property
    def grpc(self) -> str:
        return f"{self.host}:{self.grpc_port}"

    @property
    def metrics(self) -> str:
        return f"http://{self.host}:{self.metrics_port}/metrics"

    @property
    def ports(self) -> list[tuple[str, int]]:
        """All, each with the argument of `diffuserve serve` that chooses it."""
        return [
            ("--http-port", self.http_port),
            ("--grpc-port", self.grpc_port),
            ("--metrics-port", self.metrics_port),
        ]

    @classmethod
    def on_free_ports(cls) -> Self:
        """Loopback, at ports that nothing listens on now."""
        _, *ports = fields(cls)
        host = "127.0.0.1"
        return cls(host, *free_ports(host, len(ports)))
