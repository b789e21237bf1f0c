"""The transport for each protocol of `diffuserve_loadtest.sending.target`."""

from __future__ import annotations

from diffuserve_loadtest.sending.target import Target
from diffuserve_loadtest.sending.transport import Transport


def open_transport(target: Target, max_in_flight: int) -> Transport:
    """The transport for a target, which must be called after gevent has patched the standard library."""
    if target.protocol in ("triton-grpc", "torchserve-grpc"):
        from diffuserve_loadtest.sending.grpc_transport import GrpcTransport

        return GrpcTransport(target)
    from diffuserve_loadtest.sending.http_transport import HttpTransport

    return HttpTransport(target, max_in_flight)
