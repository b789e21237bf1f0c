"""Starts TorchServe on a model archive, waits until it serves, drains it and leaves nothing behind.

TorchServe's own command starts Java in the background and writes a file about it among the temporary ones, so that one
machine runs one TorchServe. Java is started directly here, with a run folder for all that it and its workers write.

TorchServe starts a worker again that has died. But when its own thread for the worker fails, which a client can bring about
by a Predictions call that asks for progress, it never does, and its clients wait forever. So the launcher ends a
TorchServe that has had no worker for a while: the connections break, which clients notice, and `diffuserve serve` ends with
an error, so that whatever supervises it can start it again.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

from diffuserve.defaults import KEY_FILE, READY_TIMEOUT_S
from diffuserve.errors import LaunchError
from diffuserve.serving.launcher import Served, ServerLauncher
from diffuserve.serving.lifecycle import RUN_FOLDER_VARIABLE, BusySign
from diffuserve.serving.process import ServerProcess, accepts_connections, answer_of
from diffuserve.tensors import STABLE_DIFFUSION
from diffuserve.torchserve.address import TorchServeAddress
from diffuserve.torchserve.configuration import log_settings, properties, read_archive
from diffuserve.torchserve.java import find_java
from diffuserve.torchserve.keys import read_token

_STOP_TIMEOUT_S = 10.0
# Longer than a worker that has answered one batch needs to be given the next, besides the batch's delay.
_IDLE_S = 0.5
# TorchServe waits up to 13 s before it starts a worker for the seventh time.
_NO_WORKER_TIMEOUT_S = 15.0
_SHOWN = {"error": ("ERROR",), "warning": ("ERROR", "WARN"), "info": ("ERROR", "WARN", "INFO")}


class TorchServeServer(ServerLauncher[TorchServeAddress]):
    """A running TorchServe; a context manager that stops it.

    Args:
        archive: the .mar file, made by `diffuserve archive`.
        address, log_level, ready_timeout_s: as in `ServerLauncher`.
        key_file: where a link to TorchServe's file of keys is put while it runs; only this user can read the file.

    Raises:
        LaunchError: a port is taken, Java or TorchServe is missing, `key_file` exists, or a worker could not start; the
            message carries the reason.
        BundleError: the archive is missing or damaged.
        ConfigurationError: an option in the archive is unknown or not allowed.
    """

    name = "TorchServe"
    watch_interval_s = 0.5

    def __init__(
        self,
        archive: Path,
        address: TorchServeAddress,
        *,
        key_file: Path = KEY_FILE,
        log_level: str = "error",
        ready_timeout_s: float = READY_TIMEOUT_S,
    ) -> None:
        super().__init__(address, log_level=log_level, ready_timeout_s=ready_timeout_s)
        self.archive = read_archive(archive)
        self.key_file = key_file.absolute()
        self._busy_sign: BusySign | None = None
        self._busy_s = 0.0

    @property
    def served(self) -> tuple[Served, ...]:
        address = self.address
        places = {
            "gRPC": address.grpc,
            "HTTP": f"{address.http}/predictions/{STABLE_DIFFUSION}",
            "metrics": address.metrics,
            "keys": str(self.key_file),
        }
        url = "" if address.grpc_port == TorchServeAddress().grpc_port else f" --url {address.grpc}"
        key = "" if self.key_file == KEY_FILE.absolute() else f" --key-file {self.key_file}"
        return (Served(self.archive.manifest, self.archive.limits, places, f" --server torchserve{url}{key}"),)

    def _has_failed(self, process: ServerProcess) -> str:
        """Whether it has had no worker for a while."""
        now_s = time.monotonic()
        if process.has_children:
            self._worker_seen_s = now_s
        if now_s - self._worker_seen_s <= _NO_WORKER_TIMEOUT_S:
            return ""
        return "TorchServe has lost its workers and starts no other, so it was ended. Start it again."

    def _is_drained(self, asked_s: float) -> bool:
        """Whether no worker has had a batch for longer than a batch's delay."""
        now_s = time.monotonic()
        if self._busy_sign is not None and self._busy_sign.busy:
            self._busy_s = now_s
        idle_s = now_s - max(self._busy_s, asked_s)
        return idle_s >= _IDLE_S + float(self.archive.config["maxBatchDelay"]) / 1000

    @property
    def _stop_timeout_s(self) -> float:
        return _STOP_TIMEOUT_S

    def _clean_up(self) -> None:
        if self._busy_sign is not None:
            self._busy_sign.close()
        if self.key_file.is_symlink() and self.key_file.readlink().parent == self._run_folder:
            self.key_file.unlink()

    def _start(self, run_folder: Path) -> ServerProcess:
        self._busy_sign = BusySign(run_folder)
        self._worker_seen_s = time.monotonic()
        self._link_keys(run_folder / "key_file.json")
        java = find_java()
        spec = importlib.util.find_spec("ts")
        if spec is None or spec.origin is None:
            raise LaunchError("TorchServe is not installed. Install it: pip install 'diffuserve[torchserve]'")
        package = Path(spec.origin).parent
        temporary = run_folder / "tmp"
        temporary.mkdir()
        config = run_folder / "config.properties"
        config.write_text(properties(self.archive, self.address))
        logging = run_folder / "log4j2.xml"
        logging.write_text(log_settings(self._log_level))
        command = [
            str(java),
            f"-Dmodel_server_home={package.parent}",
            f"-Dlog4j.configurationFile={logging.as_uri()}",
            # Where archives are unpacked and the workers' sockets lie, which other servers of this machine have too.
            f"-Djava.io.tmpdir={temporary}",
            "-cp",
            str(package / "frontend" / "*"),
            "org.pytorch.serve.ModelServer",
            "--python",
            sys.executable,
            "-f",
            str(config),
            "-ncs",
        ]
        environment = {**os.environ, RUN_FOLDER_VARIABLE: str(run_folder), "TMPDIR": str(temporary)}
        shown = _SHOWN[self._log_level]
        return ServerProcess(
            self.name, command, environment, folder=run_folder, show=lambda line: line.startswith(shown)
        )

    def _is_ready(self, process: ServerProcess) -> bool:
        # TorchServe would start a worker that failed again and again.
        if process.error is not None:
            raise LaunchError(f"TorchServe's worker could not start. {process.error}")
        # gRPC opens after HTTP, sometimes after the workers are ready.
        return self._workers_ready() and accepts_connections(self.address.host, self.address.grpc_port)

    def _workers_ready(self) -> bool:
        """Whether every worker has loaded the model; /ping says `Healthy` as soon as they have been started."""
        try:
            token = read_token(self.key_file, "management")
        except LaunchError:
            return False  # not written yet
        url = f"http://{self.address.host}:{self.address.management_port}/models/{STABLE_DIFFUSION}"
        answer = answer_of(url, {"Authorization": f"Bearer {token}"})
        if answer is None:
            return False
        workers = json.loads(answer)[0]["workers"]
        return bool(workers) and all(worker["status"] == "READY" for worker in workers)

    def _link_keys(self, keys: Path) -> None:
        """A link, since the file must stay where TorchServe writes it, and nobody else may read it."""
        try:
            self.key_file.symlink_to(keys)
        except FileExistsError:
            target = self.key_file.readlink() if self.key_file.is_symlink() else self.key_file
            if target.exists():
                raise LaunchError(
                    f"{self.key_file} exists. Another server of this folder may run; choose another file: --key-file PATH"
                ) from None
            # Of a server that was killed.
            self.key_file.unlink()
            self.key_file.symlink_to(keys)
