"""The client: prompts in, images out. `Client` for threads, `AsyncClient` for asyncio, `LocalClient` without a server.

    from diffuserve_client import Client

    with Client("localhost:8001") as client:
        result = client.generate("a slice of pizza", steps=20, seed=7)
        result.images[0].save("pizza.png")

On TorchServe it is `Client("localhost:7070", server=TorchServe(token))`. Errors are those of `diffuserve.errors`. The
classes load when they are first used, so that `import diffuserve_client` and `diffuserve generate --help` cost nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffuserve.description import Description
    from diffuserve.request import RequestFields
    from diffuserve_client.aio import AsyncClient
    from diffuserve_client.client import Client
    from diffuserve_client.local import LocalClient
    from diffuserve_client.result import Progress, Result
    from diffuserve_client.torchserve import TorchServe
    from diffuserve_client.triton import Triton

__all__ = [
    "AsyncClient",
    "Client",
    "Description",
    "LocalClient",
    "Progress",
    "RequestFields",
    "Result",
    "TorchServe",
    "Triton",
]

_MODULE = {
    "AsyncClient": "diffuserve_client.aio",
    "Client": "diffuserve_client.client",
    "Description": "diffuserve.description",
    "LocalClient": "diffuserve_client.local",
    "Progress": "diffuserve_client.result",
    "RequestFields": "diffuserve.request",
    "Result": "diffuserve_client.result",
    "TorchServe": "diffuserve_client.torchserve",
    "Triton": "diffuserve_client.triton",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_MODULE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
