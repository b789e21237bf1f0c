"""Where TorchServe listens."""

from __future__ import annotations

from dataclasses import dataclass

from diffuserve.defaults import TORCHSERVE
from diffuserve.serving.address import ServerAddress


@dataclass(frozen=True)
class TorchServeAddress(ServerAddress):
    """Loopback unless told otherwise. The two management ports answer too, but with the model API off to little."""

    host: str = "127.0.0.1"
    http_port: int = TORCHSERVE.http
    grpc_port: int = TORCHSERVE.grpc
    metrics_port: int = TORCHSERVE.metrics
    management_port: int = TORCHSERVE.http + 1
    grpc_management_port: int = TORCHSERVE.grpc + 1

    @classmethod
    def with_next_ports_for_management(cls, host: str, **ports: int) -> TorchServeAddress:
        """`ports`: by name, of those that are not for management; the others have their defaults."""
        chosen = cls(host, **ports)
        return cls(host, **ports, management_port=chosen.http_port + 1, grpc_management_port=chosen.grpc_port + 1)

    @property
    def ports(self) -> list[tuple[str, int]]:
        management = [("--http-port", self.management_port), ("--grpc-port", self.grpc_management_port)]
        return [*super().ports, *management]
