"""How a launcher asks what it started to drain, hears that it has, and notices when a process has died.

On SIGTERM Triton stops its schedulers first, so a running loop's next UNet call would fail: Triton cannot drain a model
that calls others. The launcher therefore asks the model before it stops Triton. Two empty files in a folder that only
this user can enter carry that, since the model's process has no other link to the launcher.

When the model's process dies, Triton calls the model ready as before, and its clients wait forever. So the process holds
a lock on a third file there, which the kernel lets go of whatever way the process ends.

TorchServe may run several workers, so each shows by a lock on the same file whether it is at work.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

RUN_FOLDER_VARIABLE = "DIFFUSERVE_RUN_FOLDER"


class DrainFiles:
    """`drain` is made by the launcher, `drained` by the model once nothing is active."""

    def __init__(self, run_folder: Path) -> None:
        self._drain = run_folder / "drain"
        self._drained = run_folder / "drained"

    @classmethod
    def from_environment(cls) -> DrainFiles | None:
        """Those of the launcher that started this process, or None if it was started in another way."""
        folder = os.environ.get(RUN_FOLDER_VARIABLE)
        return cls(Path(folder)) if folder else None

    def request_drain(self) -> None:
        self._drain.touch()

    @property
    def drain_requested(self) -> bool:
        return self._drain.exists()

    def report_drained(self) -> None:
        self._drained.touch()

    @property
    def drained(self) -> bool:
        return self._drained.exists()


class LifeSign:
    """The lock that the in-flight model's process holds."""

    def __init__(self, run_folder: Path) -> None:
        self._path = run_folder / "alive"
        self._held: IO[bytes] | None = None

    @classmethod
    def from_environment(cls) -> LifeSign | None:
        """As `DrainFiles.from_environment`."""
        folder = os.environ.get(RUN_FOLDER_VARIABLE)
        return cls(Path(folder)) if folder else None

    def give(self) -> None:
        """For the model: holds the lock until `withdraw` or the process's end."""
        self._held = self._path.open("wb")
        fcntl.flock(self._held, fcntl.LOCK_EX)

    def withdraw(self) -> None:
        """For the model that ends as it should."""
        self._path.unlink(missing_ok=True)

    @property
    def lost(self) -> bool:
        """For the launcher, once the model is ready: whether the process has ended without `withdraw`."""
        try:
            with self._path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (FileNotFoundError, BlockingIOError):
            return False
        return True


class BusySign:
    """A lock that every worker of TorchServe shares with the others while it works on a batch."""

    def __init__(self, run_folder: Path) -> None:
        self._file = (run_folder / "busy").open("ab")

    @classmethod
    def from_environment(cls) -> BusySign | None:
        """As `DrainFiles.from_environment`."""
        folder = os.environ.get(RUN_FOLDER_VARIABLE)
        return cls(Path(folder)) if folder else None

    def __enter__(self) -> None:
        """For a worker: at work until the block ends, or the process."""
        fcntl.flock(self._file, fcntl.LOCK_SH)

    def __exit__(self, *exception: object) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        self._file.close()

    @property
    def busy(self) -> bool:
        """For the launcher: whether any worker is at work now."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self._file, fcntl.LOCK_UN)
        return False
