"""How a launcher asks what it started to drain, hears that it has, and notices when a process has died.

On SIGTERM Triton stops its schedulers first, so a running loop's next UNet call would fail: Triton cannot drain a model
that calls others. The launcher therefore asks the models before it stops Triton. Empty files in a folder that only this user
can enter carry that, since a model's process has no other link to the launcher: one asks all models, and each has one of its
own to answer.

When a model's process dies, Triton calls the model ready as before, and its clients wait forever. So the process holds a lock
on another file there, which the kernel lets go of whatever way the process ends.

TorchServe may run several workers, so each shows by a lock on the same file whether it is at work.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

RUN_FOLDER_VARIABLE = "DIFFUSERVE_RUN_FOLDER"


def run_folder_from_environment() -> Path | None:
    """That of the launcher that started this process, or None if it was started in another way."""
    folder = os.environ.get(RUN_FOLDER_VARIABLE)
    return Path(folder) if folder else None


class DrainRequest:
    """The file by which the launcher asks everything that it started to drain."""

    def __init__(self, run_folder: Path) -> None:
        self._path = run_folder / "drain"

    @classmethod
    def from_environment(cls) -> DrainRequest | None:
        """That of the launcher, or None without one."""
        folder = run_folder_from_environment()
        return cls(folder) if folder else None

    def make(self) -> None:
        """For the launcher."""
        self._path.touch()

    @property
    def made(self) -> bool:
        """For a model or worker."""
        return self._path.exists()


class ModelSigns:
    """What the process of an in-flight model and the launcher tell each other.

    Args:
        run_folder: of the launcher.
        model: the model's name.
    """

    def __init__(self, run_folder: Path, model: str) -> None:
        self.model = model
        self._alive = run_folder / f"{model}.alive"
        self._drained = run_folder / f"{model}.drained"
        self._drain_request = DrainRequest(run_folder)
        self._held: IO[bytes] | None = None

    @classmethod
    def from_environment(cls, model: str) -> ModelSigns | None:
        """Those of a model, for its process; None without a launcher."""
        folder = run_folder_from_environment()
        return cls(folder, model) if folder else None

    def live(self) -> None:
        """For the model: shows that its process lives, by a lock that it holds until `end` or the process's end."""
        self._held = self._alive.open("wb")
        fcntl.flock(self._held, fcntl.LOCK_EX)

    def end(self) -> None:
        """For the model that ends as it should."""
        self._alive.unlink(missing_ok=True)
        if self._held:
            self._held.close()

    @property
    def lives(self) -> bool:
        """Whether the process lives."""
        return self._alive.exists() and not self.died

    @property
    def died(self) -> bool:
        """For the launcher, once the model is ready: whether its process has ended without `end`."""
        try:
            with self._alive.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (FileNotFoundError, BlockingIOError):
            return False
        return True

    @property
    def drain_requested(self) -> bool:
        """For the model."""
        return self._drain_request.made

    def report_drained(self) -> None:
        """For the model, once nothing is active and nothing can become active."""
        self._drained.touch()

    @property
    def drained(self) -> bool:
        """For the launcher."""
        return self._drained.exists()


class BusySign:
    """A lock that every worker of TorchServe shares with the others while it works on a batch."""

    def __init__(self, run_folder: Path) -> None:
        self._file = (run_folder / "busy").open("ab")

    @classmethod
    def from_environment(cls) -> BusySign | None:
        """That of the launcher, or None without one."""
        folder = run_folder_from_environment()
        return cls(folder) if folder else None

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
