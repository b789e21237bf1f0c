"""`diffuserve serve`."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import click

from diffuserve.triton.address import Address

_PORT = click.IntRange(1, 65535)


@click.command("serve", short_help="Starts Triton on a model repository.")
@click.option(
    "--repository",
    type=click.Path(path_type=Path),
    default=Path("triton_repo"),
    show_default=True,
    help="Model repository, made by `diffuserve assemble`.",
)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; Triton authenticates nobody."
)
@click.option("--http-port", type=_PORT, default=8000, show_default=True)
@click.option("--grpc-port", type=_PORT, default=8001, show_default=True)
@click.option("--metrics-port", type=_PORT, default=8002, show_default=True)
@click.option(
    "--grace",
    "grace_s",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    help="Seconds that running requests get to finish.",
)
@click.option(
    "--log-level",
    type=click.Choice(["error", "warning", "info"]),
    default="error",
    show_default=True,
    help="Triton's log on stderr.",
)
def command(
    repository: Path, host: str, http_port: int, grpc_port: int, metrics_port: int, grace_s: float, log_level: str
) -> None:
    """Serves a model repository on Triton until SIGTERM or Ctrl-C.

    Then new requests are refused, those that run get --grace seconds to finish, and Triton stops. A second signal stops
    it at once. Triton is taken from $TRITONSERVER, the PATH or the nvidia-pytriton package.
    """
    from diffuserve.triton.launcher import TritonServer

    address = Address(host, http_port, grpc_port, metrics_port)
    stop, stop_now = threading.Event(), threading.Event()

    def on_signal(number: int, frame: object) -> None:
        (stop_now if stop.is_set() else stop).set()

    # Until the server is ready there is nothing to drain, so SIGTERM ends the start as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    click.echo("Starting Triton ...", err=True)
    with TritonServer(repository, address, log_level=log_level) as server:
        signal.signal(signal.SIGTERM, on_signal)
        signal.signal(signal.SIGINT, on_signal)
        click.echo(_summary(repository, address, grace_s))
        while server.running and not stop.wait(0.2):
            pass
        if not server.running:
            raise click.ClickException(
                server.failure or "Triton has ended by itself. Start with --log-level info to see why."
            )
        click.echo(f"Stopping: finishing running requests, up to {grace_s:g} s ...", err=True)
        if not server.drain(grace_s, give_up=stop_now):
            click.echo("Some requests were not finished; their clients see the connection break.", err=True)
    click.echo("Stopped.", err=True)


def _summary(repository: Path, address: Address, grace_s: float) -> str:
    """What is served, where, and within which limits."""
    from dataclasses import fields

    from diffuserve.bundle import read_manifest
    from diffuserve.request import Limits
    from diffuserve.tensors import STABLE_DIFFUSION, UNET
    from diffuserve.triton.launcher import read_parameters

    manifest = read_manifest(repository / STABLE_DIFFUSION / "1")
    model, unet = manifest.model, manifest.components[UNET]
    limits = Limits.from_parameters(model, read_parameters(repository))
    lines = [
        f"Serving {model.name}, {model.width}x{model.height} px, UNet on {unet.engine} {unet.precision}",
        f"  gRPC     {address.grpc}",
        f"  HTTP     {address.http}/v2/models/{STABLE_DIFFUSION}/generate",
        f"  metrics  {address.metrics}",
        "  limits   " + ", ".join(f"{field.name} {getattr(limits, field.name):g}" for field in fields(limits)),
        f'Draw:  diffuserve generate "a slice of pizza, glossy"{_url_option(address)}',
        f"Stop:  Ctrl-C or SIGTERM; running requests get {grace_s:g} s to finish",
    ]
    return "\n".join(lines)


def _url_option(address: Address) -> str:
    return "" if address.grpc_port == Address().grpc_port else f" --url {address.grpc}"
