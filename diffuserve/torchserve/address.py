"""Where TorchServe listens."""

from __future__ import annotations

from dataclasses import dataclass

from diffuserve.serving.process import free_ports


@dataclass(frozen=True)
class TorchServeAddress:
    """Loopback unless told otherwise. The two management ports answer too, but with the model API off to little."""

    host: str = "127.0.0.1"
    http_port: int = 8080
    grpc_port: int = 7070
    metrics_port: int = 8082
    management_port: int = 8081
    grpc_management_port: int = 7071

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
    def on_free_ports(cls) -> TorchServeAddress:
        """Loopback, at ports that nothing listens on now."""
        return cls(cls.host, *free_ports(cls.host, 5))
