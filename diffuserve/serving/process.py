"""A server's process: started in a session of its own, its log read, and ended with all its children."""

from __future__ import annotations

import collections
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from diffuserve.errors import DiffuserveError, LaunchError, from_wire

# Waits for the end of its input, which the kernel closes when whoever started it ends, in whatever way; then kills the process
# group whose number is its argument. A program of its own, since a launcher that is killed with SIGKILL can do nothing, a signal to
# the server alone (PR_SET_PDEATHSIG) does not reach its children, and Triton's own watch over them misses some.
_GUARD = ("/bin/sh", "-c", 'read -r _; kill -9 -"$0"')
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Triton's Python backend keeps its regions, not a temporary folder


class ServerProcess:
    """A running server.

    Args:
        name: what messages call it.
        command: program and arguments.
        environment: its variables, all of them.
        folder: where it runs; by default here.
        show: whether a line of its log goes to this process's standard error.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        folder: Path | None = None,
        show: Callable[[str], bool],
    ) -> None:
        self._name = name
        self._show = show
        self._log_tail: collections.deque[str] = collections.deque(maxlen=200)
        self._process = subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # A session of its own: Ctrl-C in the terminal reaches the launcher only, which drains first.
            start_new_session=True,
        )
        self._guard = subprocess.Popen(
            [*_GUARD, str(self._process.pid)], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self._log_pump = threading.Thread(target=self._pump_log, args=(self._process.stdout,), daemon=True)
        self._log_pump.start()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_children(self) -> bool:
        """Whether it has any process of its own, such as a worker."""
        try:
            lists = [path.read_text() for path in Path(f"/proc/{self.pid}/task").glob("*/children")]
        except OSError:  # a thread has ended meanwhile
            return True
        return any(lists)

    @property
    def error(self) -> DiffuserveError | None:
        """The first error of ours among the last lines of the log, if there is one."""
        return next((error for line in list(self._log_tail) if (error := from_wire(line)) is not None), None)

    def wait_until(self, is_ready: Callable[[], bool], timeout_s: float) -> None:
        """Raises LaunchError, with the server's own reason, if it ends or `timeout_s` seconds pass before `is_ready`."""
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            if not self.running:
                self._log_pump.join()
                raise LaunchError(f"{self._name} stopped while it was starting. {self._reason()}")
            if is_ready():
                return
            time.sleep(0.05)
        raise LaunchError(
            f"{self._name} was not ready within {timeout_s:g} s; --ready-timeout allows more. {self._reason()}"
        )

    def stop(self, timeout_s: float) -> None:
        """Asks the server to end, waits `timeout_s` seconds, and kills what is left of its session."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self.running:
                self._process.terminate()
                self._process.wait(timeout_s)
        self.kill()
        self._process.wait()
        self._guard.kill()
        self._guard.communicate()
        self._log_pump.join()

    def kill(self) -> None:
        """Kills the whole session: children whose server has died or hangs go too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _pump_log(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                self._log_tail.append(line.rstrip())
                if self._show(line):
                    sys.stderr.write(line)

    def _reason(self) -> str:
        if self.error is not None:
            return str(self.error)
        return "Its last words: " + " | ".join(list(self._log_tail)[-5:])


def make_run_folder() -> Path:
    """A folder for one run of a server that only this user can enter; its name carries the launcher's process number,
    by which `remove_leftovers_of_the_dead` knows it."""
    return Path(tempfile.mkdtemp(prefix=f"diffuserve_{os.getpid()}_"))


def remove_leftovers_of_the_dead() -> None:
    """Shared memory and run folders of launchers that were killed with SIGKILL and could not clean up.

    A launcher counts as dead if its process number is not in /proc. Containers that share one of these folders, but not their
    process numbers, take each other's launchers for dead. So each needs a /dev/shm and a folder for temporary files of its own.
    """
    for folder in (SHARED_MEMORY, Path(tempfile.gettempdir())):
        for path in folder.glob("diffuserve_*"):
            match = re.match(r"diffuserve_(\d+)_", path.name)
            if match is None or Path(f"/proc/{match[1]}").exists():
                continue
            with contextlib.suppress(FileNotFoundError):  # another launcher may clean up at the same time
                if path.lstat().st_uid != os.getuid():
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()


def check_ports(host: str, ports: Sequence[tuple[str, int]]) -> None:
    """Raises LaunchError if one of `ports`, each with the option that chooses it, is out of range, there twice, or cannot be
    listened on. An option may choose a second port, the next one."""
    chosen_by: dict[int, str] = {}
    for option, port in ports:
        if not 1 <= port <= 65535:
            raise LaunchError(
                f"{option} leads to port {port}; a port is from 1 to 65535. Choose another: {option} PORT"
            )
        if port in chosen_by:
            raise LaunchError(
                f"{chosen_by[port]} and {option} lead to the same port, {port}. Choose another: {option} PORT"
            )
        chosen_by[port] = option
    for option, port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise LaunchError(
                    f"Port {port} on {host} cannot be used ({error.strerror}). Choose another: {option} PORT"
                ) from None


def free_ports(host: str, count: int) -> tuple[int, ...]:
    """Ports that nothing listens on now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((host, 0))
        return tuple(probe.getsockname()[1] for probe in probes)


def accepts_connections(host: str, port: int) -> bool:
    """Whether anything listens there."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False
