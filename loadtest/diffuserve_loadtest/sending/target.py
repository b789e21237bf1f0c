"""Where a load goes, and in which protocol."""

from __future__ import annotations

from typing import Literal, get_args
from urllib.parse import urlsplit

import msgspec

from diffuserve.errors import InvalidRequest
from diffuserve.tensors import STABLE_DIFFUSION

_LOOPBACK = ("localhost", "127.0.0.1", "::1")

Protocol = Literal["triton-grpc", "triton-http", "triton-stream", "torchserve-grpc", "torchserve-http", "image-http"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
"""triton-grpc is diffuserve_client; triton-http Triton's /generate; triton-stream its /generate_stream with an event per step;
image-http what other servers speak: the request's fields as JSON in, an image file out."""


class Target(msgspec.Struct, frozen=True):
    """One server.

    Attributes:
        protocol: one of `PROTOCOLS`.
        url: HOST:PORT for gRPC, http://HOST:PORT for HTTP, with the whole path for image-http.
        token: TorchServe's inference key; None if the server asks for none.
        model: what requests ask for; other servers than Triton and TorchServe have one only.
    """

    protocol: Protocol
    url: str
    token: str | None = None
    model: str = STABLE_DIFFUSION

    def __post_init__(self) -> None:
        scheme = "" if self.protocol.endswith("grpc") else "http"
        if self.url.partition("://")[0] != scheme and (scheme or "://" in self.url):
            form = "http://HOST:PORT" if scheme else "HOST:PORT"
            raise InvalidRequest(f"{self.url!r} is not an address for {self.protocol}; it must be {form}.")
        host = urlsplit(self.url if "://" in self.url else f"//{self.url}").hostname
        if host not in _LOOPBACK:
            raise InvalidRequest(
                f"{self.url!r} is not this machine: a load goes to {', '.join(_LOOPBACK)} only, with a port behind."
            )
