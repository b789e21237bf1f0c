"""Where the server is and how long to wait for it, for both clients."""

from __future__ import annotations

from dataclasses import dataclass

from grpc.experimental import ChannelOptions

from diffuserve.defaults import TRITON
from diffuserve.errors import InvalidRequest

DEFAULT_URL = f"localhost:{TRITON.grpc}"


@dataclass(frozen=True)
class Endpoint:
    """The arguments of `Client` and `AsyncClient`, described there.

    Raises:
        InvalidRequest: `url` is an HTTP address or lacks the port.
    """

    url: str
    model: str
    connect_timeout_s: float
    idle_timeout_s: float | None

    def __post_init__(self) -> None:
        if self.url.startswith(("unix:", "unix-abstract:", "dns:", "ipv4:", "ipv6:")):  # gRPC's own names
            return
        host, _, port = self.url.rpartition(":")
        if not host or not port.isdecimal() or "/" in host:
            raise InvalidRequest(
                f"{self.url!r} is not an address of a gRPC server; it must be HOST:PORT, such as {DEFAULT_URL}."
            )

    def channel_options(self) -> list[tuple[str, int]]:
        """Options of the gRPC channel."""
        connect_timeout_ms = max(1, round(self.connect_timeout_s * 1000))
        options = [
            ("grpc.max_receive_message_length", -1),  # several raw images easily exceed gRPC's 4 MB
            ("grpc.max_send_message_length", -1),
            # gRPC's name for the time that one attempt to connect may take.
            ("grpc.min_reconnect_backoff_ms", connect_timeout_ms),
            ("grpc.dns_ares_query_timeout", connect_timeout_ms),
            # A server that is being restarted is found within a second, not within gRPC's two minutes.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
            # Triton closes connections that ping more often than every 300 s.
            ("grpc.keepalive_time_ms", 310_000),
            ("grpc.keepalive_timeout_ms", 20_000),
        ]
        # Answers are read by the thread that waits for them. By default gRPC has another one for that, and wakes every
        # waiting thread ten times a second: with 500 requests in flight, a quarter of a core.
        options.append((ChannelOptions.SingleThreadedUnaryStream, 1))
        host = self.url.rpartition(":")[0].strip("[]")
        if host in ("localhost", "::1") or host.startswith("127."):
            options.append(("grpc.enable_http_proxy", 0))  # a proxy cannot reach this machine's loopback
        return options
