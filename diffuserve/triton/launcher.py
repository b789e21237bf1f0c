"""Starts Triton on a model repository, waits until it serves, drains it and leaves nothing behind.

Triton does not start a model's process again when it has died. For the stages their in-flight model sees to that
(`diffuserve.triton.bls_stages`). When an in-flight model's own process dies, Triton 2.51 keeps its clients' streams open for
good, and crashes when the model is loaded again. So the launcher then ends Triton at once, with whatever other models it
serves: the streams break, which clients notice, and `diffuserve serve` ends with an error, so that whatever supervises it can
start it again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from diffuserve.bundle.manifest import read_manifest
from diffuserve.defaults import READY_TIMEOUT_S
from diffuserve.serving.http import answers_ok
from diffuserve.serving.launcher import Served, ServerLauncher
from diffuserve.serving.lifecycle import RUN_FOLDER_VARIABLE, ModelSigns
from diffuserve.serving.process import SHARED_MEMORY, ServerProcess, accepts_connections
from diffuserve.tensors import STABLE_DIFFUSION
from diffuserve.triton.address import TritonAddress
from diffuserve.triton.configuration import read_options
from diffuserve.triton.installation import find_installation
from diffuserve.triton.model_control import MODEL_CONTROL_VARIABLE, ModelControl
from diffuserve.triton.neighbours import RunFolderNeighbours
from diffuserve.triton.placement import VERSION
from diffuserve.triton.repository import check_repository

_LOG_FLAGS = {"error": (False, False), "warning": (True, False), "info": (True, True)}
# What Triton says, whatever its log level, where there is no GPU, and when it is asked to stop.
_HARMLESS = ("Failed to initialize NVML", "CudaDriverHelper has not been initialized", "Signal (15) received")
# Triton takes about three seconds. After draining there is nothing left to lose, and Triton 2.51 sometimes keeps a request
# whose client hung up in the middle, and with it the model, for good.
_UNLOAD_TIMEOUT_S = 6.0
_ABORT_TIMEOUT_S = 2.0
_LARGE_BLOCK_BYTES = 2**20


class TritonServer(ServerLauncher[TritonAddress]):
    """A running tritonserver; a context manager that stops it.

    Args:
        repository: the model repository, made by `diffuserve assemble`.
        address, log_level, ready_timeout_s: as in `ServerLauncher`.

    Raises:
        LaunchError: a port is taken, Triton is missing, or it gave up; the message carries the reason.
        BundleError: the repository is not complete, or of several bundles.
        ConfigurationError: an option in a config.pbtxt is unknown or not allowed, or the stages are configured for others.
    """

    name = "Triton"

    def __init__(
        self,
        repository: Path,
        address: TritonAddress,
        *,
        log_level: str = "error",
        ready_timeout_s: float = READY_TIMEOUT_S,
    ) -> None:
        super().__init__(address, log_level=log_level, ready_timeout_s=ready_timeout_s)
        self.repository = repository
        self.models: tuple[str, ...] = ()
        """The names that requests may ask for, known once it is started."""
        self._signs: tuple[ModelSigns, ...] = ()
        self._shared_memory_prefix = f"diffuserve_{os.getpid()}_{address.grpc_port}_"

    @property
    def served(self) -> tuple[Served, ...]:
        return tuple(map(self._served, self.models))

    def _served(self, model: str) -> Served:
        address = self.address
        places = {
            "gRPC": address.grpc,
            "HTTP": f"{address.http}/v2/models/{model}/generate",
            "metrics": address.metrics,
        }
        limits, _ = read_options(self.repository, model)
        url = "" if address.grpc_port == TritonAddress().grpc_port else f" --url {address.grpc}"
        name = "" if model == STABLE_DIFFUSION else f" --model {model}"
        return Served(read_manifest(self.repository / model / VERSION), limits, places, f"{url}{name}")

    def _check(self) -> None:
        self.models = check_repository(self.repository)

    def _is_ready(self, process: ServerProcess) -> bool:
        # Triton opens the port of its metrics last, a moment after it calls itself ready.
        metrics = self.address.metrics_port
        return answers_ok(f"{self.address.http}/v2/health/ready") and accepts_connections(self.address.host, metrics)

    def _has_failed(self, process: ServerProcess) -> str:
        dead = [signs.model for signs in self._signs if signs.died]
        return f"The process of {' and '.join(dead)} has died, so Triton was ended. Start it again." if dead else ""

    def _is_drained(self, asked_s: float) -> bool:
        return self._drained

    @property
    def _stop_timeout_s(self) -> float:
        """A Triton that has drained gets time to unload its models. One that has not would wait in vain for calls between
        its models, which it can no longer carry out."""
        return _UNLOAD_TIMEOUT_S if self._drained else _ABORT_TIMEOUT_S

    @property
    def _drained(self) -> bool:
        return all(signs.drained for signs in self._signs)

    def _clean_up(self) -> None:
        for path in SHARED_MEMORY.glob(f"{self._shared_memory_prefix}*"):
            path.unlink(missing_ok=True)

    def _start(self, run_folder: Path) -> ServerProcess:
        self._signs = tuple(ModelSigns(run_folder, model) for model in self.models)
        RunFolderNeighbours.prepare(run_folder, self.models)
        installation = find_installation(run_folder)
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
        environment = _environment(installation.library_paths, run_folder, control)
        return ServerProcess(
            self.name, command, environment, show=lambda line: not any(words in line for words in _HARMLESS)
        )


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
