"""Where TorchServe listens."""

from __future__ import annotations

from dataclasses import dataclass

from diffuserve.serving.address import ServerAddress


@dataclass(frozen=True)
class TorchServeAddress(ServerAddress):
    """Loopback unless told otherwise. The two management ports answer too, but with the model API off to little."""

    host: str = "127.0.0.1"
    http_port: int = 8080
    grpc_port: int = 7070
    metrics_port: int = 8082
    management_port: int = 8081
    grpc_management_port: int = 7071

    @classmethod
    def with_next_ports_for_management(cls, host: str, **ports: int) -> TorchServeAddress:
        """`ports`: by name, of those that are not for management; the others have their defaults."""
        chosen = cls(host, **ports)
        return cls(host, **ports, management_port=chosen.http_port + 1, grpc_management_port=chosen.grpc_port + 1)

    @property
    def ports(self) -> list[tuple[str, int]]:
        management = [("--http-port", self.management_port), ("--grpc-port", self.grpc_management_port)]
        return [*super().ports, *management]
