"""Where a server listens."""

from __future__ import annotations

from dataclasses import dataclass

from diffuserve.serving.process import free_ports


@dataclass(frozen=True)
class Address:
    """Where the server listens. Loopback unless told otherwise: Triton itself authenticates nobody."""

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002

    @property
    def http(self) -> str:
        return f"http://{self.host}:{self.http_port}"

    @property
    def grpc(self) -> str:
        return f"{self.host}:{self.grpc_port}"

    @property
    def metrics(self) -> str:
        return f"http://{self.host}:{self.metrics_port}/metrics"

    @classmethod
    def on_free_ports(cls) -> Address:
        """Loopback, at three ports that nothing listens on now."""
        return cls(cls.host, *free_ports(cls.host, 3))
