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
import shutil
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from diffuserve.defaults import READY_TIMEOUT_S
from diffuserve.errors import LaunchError
from diffuserve.serving.lifecycle import RUN_FOLDER_VARIABLE, BusySign, DrainRequest
from diffuserve.serving.process import (
    ServerProcess,
    accepts_connections,
    answer_of,
    check_ports,
    make_run_folder,
    remove_leftovers_of_the_dead,
)
from diffuserve.tensors import STABLE_DIFFUSION
from diffuserve.torchserve.address import TorchServeAddress
from diffuserve.torchserve.configuration import log_settings, properties, read_archive
from diffuserve.torchserve.java import find_java
from diffuserve.torchserve.keys import KEY_FILE, read_token

_EXIT_GRACE_S = 10.0
_STOP_TIMEOUT_S = 10.0
# Longer than a worker that has answered one batch needs to be given the next, besides the batch's delay.
_IDLE_S = 0.5
_WATCH_INTERVAL_S = 0.5
# TorchServe waits up to 13 s before it starts a worker for the seventh time.
_NO_WORKER_TIMEOUT_S = 15.0
_SHOWN = {"error": ("ERROR",), "warning": ("ERROR", "WARN"), "info": ("ERROR", "WARN", "INFO")}


class TorchServeServer:
    """A running TorchServe; a context manager that stops it.

    Args:
        archive: the .mar file, made by `diffuserve archive`.
        address: where it listens.
        key_file: where a link to TorchServe's file of keys is put while it runs; only this user can read the file.
        log_level: error, warning or info: what of the log goes to this process's standard error.
        ready_timeout_s: how long loading may take.

    Raises:
        LaunchError: a port is taken, Java or TorchServe is missing, `key_file` exists, or a worker could not start; the
            message carries the reason.
        BundleError: the archive is missing or damaged.
    """

    def __init__(
        self,
        archive: Path,
        address: TorchServeAddress,
        *,
        key_file: Path = KEY_FILE,
        log_level: str = "error",
        ready_timeout_s: float = READY_TIMEOUT_S,
    ) -> None:
        self.archive = read_archive(archive)
        self.address = address
        self.key_file = key_file.absolute()
        self._log_level = log_level
        self._ready_timeout_s = ready_timeout_s
        self._process: ServerProcess | None = None
        self._stopping = threading.Event()
        self.failure: str | None = None
        """Why the launcher ended TorchServe without being asked to."""

    def __enter__(self) -> TorchServeServer:
        address = self.address
        ports = [
            ("--http-port", address.http_port),
            ("--http-port", address.management_port),
            ("--grpc-port", address.grpc_port),
            ("--grpc-port", address.grpc_management_port),
            ("--metrics-port", address.metrics_port),
        ]
        check_ports(address.host, ports)
        remove_leftovers_of_the_dead()
        self._run_folder = make_run_folder()
        self._drain_request = DrainRequest(self._run_folder)
        self._busy_sign = BusySign(self._run_folder)
        try:
            self._link_keys()
            self._process = self._start()
            self._process.wait_until(self._is_ready, self._ready_timeout_s)
            threading.Thread(target=self._watch, args=(self._process,), name="workers' watch", daemon=True).start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.drain(_EXIT_GRACE_S)
        self.stop()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.running

    @property
    def pid(self) -> int:
        """Of Java; the workers are children of it."""
        if self._process is None:
            raise LaunchError("TorchServe has not been started.")
        return self._process.pid

    def drain(self, grace_s: float, give_up: threading.Event | None = None) -> bool:
        """Makes the workers refuse what has not begun and waits until what has is answered.

        Args:
            grace_s: how long to wait, seconds.
            give_up: ends the waiting when set.

        Returns:
            Whether all were answered.
        """
        self._drain_request.make()
        idle_s = _IDLE_S + self.archive.config["maxBatchDelay"] / 1000
        end_s = time.monotonic() + grace_s
        idle_since_s = time.monotonic()
        while self.running and time.monotonic() < end_s and not (give_up and give_up.is_set()):
            now_s = time.monotonic()
            if self._busy_sign.busy:
                idle_since_s = now_s
            elif now_s - idle_since_s >= idle_s:
                return True
            time.sleep(0.05)
        return False

    def stop(self) -> None:
        """Stops TorchServe and its workers and removes what they left on disk. Can be called twice."""
        self._stopping.set()
        if self._process is not None:
            self._process.stop(_STOP_TIMEOUT_S)
        self._busy_sign.close()
        if self.key_file.is_symlink() and self.key_file.readlink().parent == self._run_folder:
            self.key_file.unlink()
        shutil.rmtree(self._run_folder, ignore_errors=True)

    def _start(self) -> ServerProcess:
        java = find_java()
        spec = importlib.util.find_spec("ts")
        if spec is None or spec.origin is None:
            raise LaunchError("TorchServe is not installed. Install it: pip install 'diffuserve[torchserve]'")
        package = Path(spec.origin).parent
        temporary = self._run_folder / "tmp"
        temporary.mkdir()
        config = self._run_folder / "config.properties"
        config.write_text(properties(self.archive, self.address))
        logging = self._run_folder / "log4j2.xml"
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
        environment = {**os.environ, RUN_FOLDER_VARIABLE: str(self._run_folder), "TMPDIR": str(temporary)}
        shown = _SHOWN[self._log_level]
        return ServerProcess(
            "TorchServe", command, environment, folder=self._run_folder, show=lambda line: line.startswith(shown)
        )

    def _watch(self, process: ServerProcess) -> None:
        """Ends TorchServe when it has had no worker for a while."""
        seen_s = time.monotonic()
        while process.running and not self._stopping.wait(_WATCH_INTERVAL_S):
            now_s = time.monotonic()
            if process.has_children:
                seen_s = now_s
            elif now_s - seen_s > _NO_WORKER_TIMEOUT_S:
                self.failure = "TorchServe has lost its workers and starts no other, so it was ended. Start it again."
                process.kill()
                return

    def _is_ready(self) -> bool:
        # TorchServe would start a worker that failed again and again.
        if self._process is not None and self._process.error is not None:
            raise LaunchError(f"TorchServe's worker could not start. {self._process.error}")
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

    def _link_keys(self) -> None:
        """A link, since the file must stay where TorchServe writes it, and nobody else may read it."""
        try:
            self.key_file.symlink_to(self._run_folder / "key_file.json")
        except FileExistsError:
            target = self.key_file.readlink() if self.key_file.is_symlink() else self.key_file
            if target.exists():
                raise LaunchError(
                    f"{self.key_file} exists. Another server of this folder may run; choose another file: --key-file PATH"
                ) from None
            # Of a server that was killed.
            self.key_file.unlink()
            self.key_file.symlink_to(self._run_folder / "key_file.json")
