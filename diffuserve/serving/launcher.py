"""What every launcher does: starts a server in a run folder of its own, waits until it is ready, watches it, drains it, and
leaves nothing behind."""

from __future__ import annotations

import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from diffuserve.bundle.manifest import Manifest
from diffuserve.errors import LaunchError
from diffuserve.limits import Limits
from diffuserve.serving.address import ServerAddress
from diffuserve.serving.lifecycle import DrainRequest
from diffuserve.serving.process import ServerProcess, check_ports, make_run_folder, remove_leftovers_of_the_dead

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

Address = TypeVar("Address", bound=ServerAddress)
_EXIT_GRACE_S = 10.0
_POLL_S = 0.05


@dataclass(frozen=True)
class Served:
    """One model that a server serves, for whoever started it.

    `places`: where, by what each is; `draw_with`: the arguments with which `diffuserve generate` finds it.
    """

    manifest: Manifest
    limits: Limits
    places: Mapping[str, str]
    draw_with: str


class ServerLauncher(ABC, Generic[Address]):
    """A server, running while its context lasts.

    Args:
        address: where it listens.
        log_level: error, warning or info: what of its log goes to this process's standard error.
        ready_timeout_s: seconds that loading may take.

    Raises:
        LaunchError: on entering: a port is taken, what the server needs is missing, or it gave up; the message carries the
            reason.
    """

    name: ClassVar[str]
    """What messages call the server."""
    watch_interval_s: ClassVar[float] = 0.2

    def __init__(self, address: Address, *, log_level: str, ready_timeout_s: float) -> None:
        self.address = address
        self.failure: str | None = None
        """Why the server was ended without anybody having asked for it."""
        self._log_level = log_level
        self._ready_timeout_s = ready_timeout_s
        self._process: ServerProcess | None = None
        self._stopping = threading.Event()

    # -- what each server does its own way ----------------------------------------------------------------------------

    @property
    @abstractmethod
    def served(self) -> tuple[Served, ...]:
        """Its models, once it runs."""

    def _check(self) -> None:
        """Raises whatever keeps the server from being started; before anything is made."""

    @abstractmethod
    def _start(self, run_folder: Path) -> ServerProcess:
        """Starts the process; `run_folder` is for its files, exists and is removed after the end."""

    @abstractmethod
    def _is_ready(self, process: ServerProcess) -> bool:
        """Raises LaunchError if it never will be."""

    @abstractmethod
    def _has_failed(self, process: ServerProcess) -> str:
        """Why a running server is ended, since its clients would wait forever; empty if all is well."""

    @abstractmethod
    def _is_drained(self, asked_s: float) -> bool:
        """Whether every request has been answered; `asked_s`: when the server was asked to drain, by the monotonic clock.
        Called again and again."""

    @property
    @abstractmethod
    def _stop_timeout_s(self) -> float:
        """How long it may take to end by itself."""

    def _clean_up(self) -> None:
        """Removes what the server has left outside its run folder; also after a start that failed half-way."""

    # -- what is the same for all -------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._check()
        check_ports(self.address.host, self.address.ports)
        remove_leftovers_of_the_dead()
        self._run_folder = make_run_folder()
        self._drain_request = DrainRequest(self._run_folder)
        try:
            process = self._process = self._start(self._run_folder)
            process.wait_until(lambda: self._is_ready(process), self._ready_timeout_s)
            threading.Thread(target=self._watch, args=(process,), name=f"{self.name}'s watch", daemon=True).start()
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
        """Of the server; its models and workers are children of it."""
        if self._process is None:
            raise LaunchError(f"{self.name} has not been started.")
        return self._process.pid

    def drain(self, grace_s: float, give_up: threading.Event | None = None) -> bool:
        """Makes the server refuse new requests and waits until those it has are answered.

        Args:
            grace_s: how long to wait, seconds.
            give_up: ends the waiting when set.

        Returns:
            Whether all were answered.
        """
        self._drain_request.make()
        asked_s = time.monotonic()
        end_s = asked_s + grace_s
        while self.running and time.monotonic() < end_s and not (give_up and give_up.is_set()):
            if self._is_drained(asked_s):
                return True
            time.sleep(_POLL_S)
        return False

    def stop(self) -> None:
        """Stops the server and all that it has started, and removes what they left. Can be called twice."""
        self._stopping.set()
        if self._process is not None:
            self._process.stop(self._stop_timeout_s)
        self._clean_up()
        shutil.rmtree(self._run_folder, ignore_errors=True)

    def _watch(self, process: ServerProcess) -> None:
        while process.running and not self._stopping.wait(self.watch_interval_s):
            if reason := self._has_failed(process):
                self.failure = reason
                process.kill()
                return
