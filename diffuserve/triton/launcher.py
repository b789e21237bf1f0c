"""Starts Triton on a model repository, waits until it serves, drains it and leaves nothing behind.

Triton does not start a model's process again when it has died. For the stages their in-flight model sees to that
(`diffuserve.triton.bls_stages`). When an in-flight model's own process dies, Triton 2.51 keeps its clients' streams open for
good, and crashes when the model is loaded again. So the launcher then ends Triton at once, with whatever other models it
serves: the streams break, which clients notice, and `diffuserve serve` ends with an error, so that whatever supervises it can
start it again.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from diffuserve.defaults import READY_TIMEOUT_S
from diffuserve.errors import LaunchError
from diffuserve.serving.lifecycle import RUN_FOLDER_VARIABLE, DrainRequest, ModelSigns
from diffuserve.serving.process import (
    SHARED_MEMORY,
    ServerProcess,
    answers_ok,
    check_ports,
    make_run_folder,
    remove_leftovers_of_the_dead,
)
from diffuserve.triton.address import TritonAddress
from diffuserve.triton.installation import find_installation
from diffuserve.triton.model_control import MODEL_CONTROL_VARIABLE, ModelControl
from diffuserve.triton.neighbours import RunFolderNeighbours
from diffuserve.triton.repository import check_repository

_LOG_FLAGS = {"error": (False, False), "warning": (True, False), "info": (True, True)}
# What Triton says, whatever its log level, where there is no GPU, and when it is asked to stop.
_HARMLESS = ("Failed to initialize NVML", "CudaDriverHelper has not been initialized", "Signal (15) received")
_EXIT_GRACE_S = 10.0
# Triton takes about three seconds. After draining there is nothing left to lose, and Triton 2.51 sometimes keeps a request
# whose client hung up in the middle, and with it the model, for good.
_UNLOAD_TIMEOUT_S = 6.0
_ABORT_TIMEOUT_S = 2.0
_WATCH_INTERVAL_S = 0.2
_LARGE_BLOCK_BYTES = 2**20


class TritonServer:
    """A running tritonserver; a context manager that stops it.

    Args:
        repository: the model repository, made by `diffuserve assemble`.
        address: where it listens.
        log_level: error, warning or info: what of Triton's log goes to this process's standard error.
        ready_timeout_s: how long loading may take.

    Raises:
        LaunchError: a port is taken, Triton is missing, or it gave up; the message carries the reason.
        BundleError: the repository is not complete, or of several bundles.
    """

    def __init__(
        self,
        repository: Path,
        address: TritonAddress,
        *,
        log_level: str = "error",
        ready_timeout_s: float = READY_TIMEOUT_S,
    ) -> None:
        self.repository = repository
        self.address = address
        self._log_level = log_level
        self._ready_timeout_s = ready_timeout_s
        self.models: tuple[str, ...] = ()
        """The names that requests may ask for, known once it has been entered."""
        self._process: ServerProcess | None = None
        self._stopping = threading.Event()
        self.failure: str | None = None
        """Why the launcher ended Triton without being asked to."""

    def __enter__(self) -> TritonServer:
        self.models = check_repository(self.repository)
        address = self.address
        ports = [
            ("--http-port", address.http_port),
            ("--grpc-port", address.grpc_port),
            ("--metrics-port", address.metrics_port),
        ]
        check_ports(address.host, ports)
        remove_leftovers_of_the_dead()
        self._run_folder = make_run_folder()
        self._signs = {model: ModelSigns(self._run_folder, model) for model in self.models}
        RunFolderNeighbours.prepare(self._run_folder, self.models)
        self._shared_memory_prefix = f"diffuserve_{os.getpid()}_{address.grpc_port}_"
        try:
            self._process = self._start()
            self._process.wait_until(lambda: answers_ok(f"{address.http}/v2/health/ready"), self._ready_timeout_s)
            threading.Thread(
                target=self._watch, args=(self._process,), name="in-flight models' watch", daemon=True
            ).start()
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
        """Of tritonserver; its models are children of it."""
        if self._process is None:
            raise LaunchError("Triton has not been started.")
        return self._process.pid

    def drain(self, grace_s: float, give_up: threading.Event | None = None) -> bool:
        """Makes every model refuse new requests and waits until those that they have are answered.

        Args:
            grace_s: how long to wait.
            give_up: ends the waiting when set.

        Returns:
            Whether all were answered.
        """
        DrainRequest(self._run_folder).make()
        end_s = time.monotonic() + grace_s
        while self.running and time.monotonic() < end_s and not (give_up and give_up.is_set()):
            if self._drained:
                return True
            time.sleep(0.05)
        return self._drained

    def stop(self) -> None:
        """Stops Triton and its models and removes what they left in shared memory and on disk. Can be called twice.

        A Triton that has drained gets time to unload its models. One that has not would wait in vain for calls between
        its models, which it can no longer carry out.
        """
        self._stopping.set()
        if self._process is not None:
            self._process.stop(_UNLOAD_TIMEOUT_S if self._drained else _ABORT_TIMEOUT_S)
        for path in SHARED_MEMORY.glob(f"{self._shared_memory_prefix}*"):
            path.unlink(missing_ok=True)
        shutil.rmtree(self._run_folder, ignore_errors=True)

    @property
    def _drained(self) -> bool:
        return all(signs.drained for signs in self._signs.values())

    def _start(self) -> ServerProcess:
        installation = find_installation(self._run_folder)
        warnings, info = _LOG_FLAGS[self._log_level]
        address = self.address
        control = ModelControl(address.http)
        command = [
            str(installation.binary),
            f"--model-repository={self.repository.resolve()}",
            "--disable-auto-complete-config",
            "--strict-readiness=true",
            "--exit-on-error=true",
            # So that the in-flight model can load a stage again whose process has died.
            *control.flags(),
            f"--http-address={address.host}",
            f"--http-port={address.http_port}",
            f"--grpc-address={address.host}",
            f"--grpc-port={address.grpc_port}",
            # A spare request object keeps the memory of the largest request that it has carried.
            "--grpc-infer-allocation-pool-size=0",
            f"--metrics-address={address.host}",
            f"--metrics-port={address.metrics_port}",
            f"--log-warning={str(warnings).lower()}",
            f"--log-info={str(info).lower()}",
            f"--backend-config=python,shm-region-prefix-name={self._shared_memory_prefix}",
        ]
        if installation.backend_directory:
            command.append(f"--backend-directory={installation.backend_directory}")
        environment = _environment(installation.library_paths, self._run_folder, control)
        return ServerProcess(
            "Triton", command, environment, show=lambda line: not any(words in line for words in _HARMLESS)
        )

    def _watch(self, process: ServerProcess) -> None:
        """Ends Triton when an in-flight model's process has died."""
        while process.running and not self._stopping.wait(_WATCH_INTERVAL_S):
            dead = [model for model, signs in self._signs.items() if signs.died]
            if dead:
                self.failure = f"The process of {' and '.join(dead)} has died, so Triton was ended. Start it again."
                process.kill()
                return


def _environment(library_paths: tuple[Path, ...], run_folder: Path, control: ModelControl) -> dict[str, str]:
    environment = dict(os.environ)
    # The models' processes embed an interpreter. It ignores PYTHONPATH, and finds its home, and with it a virtual
    # environment's packages, by the first python3 on the PATH.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    # glibc gives large blocks back to the system when they are freed, unless one that was freed has raised its threshold,
    # as a request of 100 MB does.
    environment.setdefault("MALLOC_MMAP_THRESHOLD_", str(_LARGE_BLOCK_BYTES))
    environment.setdefault("MALLOC_TRIM_THRESHOLD_", str(_LARGE_BLOCK_BYTES))
    environment[RUN_FOLDER_VARIABLE] = str(run_folder)
    environment[MODEL_CONTROL_VARIABLE] = control.to_environment()
    paths = [*map(str, library_paths), *filter(None, [environment.get("LD_LIBRARY_PATH")])]
    if paths:
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(paths)
    return environment
