"""From what the servers and gRPC say to the exceptions of `diffuserve.errors`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffuserve.errors import Cancelled, DiffuserveError, InvalidRequest, ServerUnavailable, StageFailed, from_wire

if TYPE_CHECKING:
    from diffuserve_client.server import Server

# Triton's own words, for what fails before our model sees the request; the second while it loads the model or stops.
_NO_MODEL = ("unknown model",)
_NO_MODEL_NOW = ("no available versions", "is not ready")
# Words of the reasons for which there is no connection where something listens that speaks no HTTP/2.
_HUNG_UP = ("Socket closed", "reset by peer", "Broken pipe")
_REFUSED_INPUT = ("inference input", "for input", "inputs but got")


def unknown_model(address: str, model: str, others: str) -> ServerUnavailable:
    """`others`: what is known of the models that there are."""
    return ServerUnavailable(f"The server at {address} does not serve the model {model!r}{others}", unknown_model=True)


def error_from_text(text: str, *, address: str, model: str) -> DiffuserveError:
    """The error that a response carries as text: ours by its code, Triton's own by its words."""
    ours = from_wire(text)
    if ours is not None:
        return ours
    lowered = text.lower()
    if any(words in lowered for words in _NO_MODEL_NOW):
        return ServerUnavailable(
            f"The server at {address} does not serve the model {model!r} now ({text}). "
            "It may still be loading, or stopping: see its log.",
            never_begun=True,
        )
    if any(words in lowered for words in _NO_MODEL):
        return unknown_model(address, model, f" ({text}). It may serve another: see its log.")
    if any(words in lowered for words in _REFUSED_INPUT):
        return InvalidRequest(f"{text.rstrip()} (Client and server may be of different versions.)")
    return StageFailed(text)


def error_from_status(code: str, details: str, *, server: Server, address: str, heard: bool) -> DiffuserveError:
    """The error for a call that gRPC ended.

    Args:
        code: name of the status, such as UNAVAILABLE.
        details: gRPC's text.
        server: of what kind it should be.
        address: the server's.
        heard: whether the server had answered before.
    """
    ours = from_wire(details)
    if ours is not None:
        return ours
    # A call that is not told to wait for a connection fails with these while there is none, and is never sent: gRPC calls a
    # connection one when the server's first HTTP/2 frame has come. One that breaks later has other words.
    if (
        code == "UNAVAILABLE"
        and not heard
        and any(words in details.lower() for words in ("failed to connect", "resolv", "resolution"))
    ):
        reason = details.rpartition(": ")[2].rstrip("]")  # the last link of gRPC's chain, such as "Connection refused"
        advice = "Check the address, or start one: diffuserve serve"
        if any(words in reason for words in _HUNG_UP):
            advice = f"What listens there hung up: give the server's gRPC port, by default {_port(server)}, not its HTTP port."
        return ServerUnavailable(f"No server answers at {address} ({reason}). {advice}", never_begun=True)
    if code == "CANCELLED":
        return Cancelled(f"The request was cancelled: the client was closed, or the server at {address} stopped.")
    if code == "UNIMPLEMENTED":
        return ServerUnavailable(
            f"What answers at {address} is no {server.name} server ({details}). Give its gRPC port, by default "
            f"{_port(server)}."
        )
    if code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        return InvalidRequest(f"The server at {address} refused the token ({details}). Read it from the server's keys.")
    if "model not found" in details.lower():  # TorchServe's words
        return ServerUnavailable(f"The server at {address} serves no such model ({details}). See its log.")
    if code == "RESOURCE_EXHAUSTED":
        return InvalidRequest(f"The server at {address} refused the request's size ({details}). Shorten the prompt.")
    return ServerUnavailable(
        f"The connection to {address} broke during the request ({code}: {details}). "
        "See whether the server still runs, then send it again."
    )


def _port(server: Server) -> str:
    return server.default_url.rpartition(":")[2]
