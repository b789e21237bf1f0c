"""What the in-flight models of one Triton tell each other, by a file for each in the launcher's run folder.

A file is replaced as a whole, so a reader sees the old one or the new one. What a process that has died left behind does not
count. All models of a server count as sharing its device.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from diffuserve.batching.load import Load
from diffuserve.files import write_whole
from diffuserve.serving.lifecycle import ModelSigns, run_folder_from_environment

log = logging.getLogger(__name__)

_SUFFIX = ".load"
# Several times what the longest `Load` takes.
_MOST_BYTES = 2**16


class RunFolderNeighbours:
    """Implements `diffuserve.batching.load.Neighbours`.

    Args:
        run_folder: of the launcher, in which `prepare` has made the files.
        model: whose neighbours the others are.
    """

    def __init__(self, run_folder: Path, model: str) -> None:
        self._own = run_folder / f"{model}{_SUFFIX}"
        self._others = [
            (ModelSigns(run_folder, path.name.removesuffix(_SUFFIX)), path)
            for path in sorted(run_folder.glob(f"*{_SUFFIX}"))
            if path != self._own
        ]
        self._failed = False

    @classmethod
    def from_environment(cls, model: str) -> RunFolderNeighbours | None:
        """Those of a model, for its process; None without a launcher, or if there are no others."""
        folder = run_folder_from_environment()
        neighbours = cls(folder, model) if folder else None
        return neighbours if neighbours and neighbours._others else None

    @staticmethod
    def prepare(run_folder: Path, models: Iterable[str]) -> None:
        """For the launcher, before it starts Triton."""
        for model in models:
            (run_folder / f"{model}{_SUFFIX}").touch()

    def publish(self, load: Load) -> None:
        """A failure is logged once, and costs no request anything but a forecast."""
        try:
            write_whole(self._own, msgspec.json.encode(load))
        except OSError as error:
            if not self._failed:
                log.error("%s cannot be written, so the other models do not hear of this one: %s", self._own, error)
            self._failed = True

    def loads(self) -> Sequence[Load]:
        return [load for signs, path in self._others if signs.lives and (load := _read(path)) is not None]


def _read(path: Path) -> Load | None:
    """None if nothing has been published yet, or nothing that can be read."""
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(_MOST_BYTES), type=Load)
    except (OSError, msgspec.DecodeError):
        return None
