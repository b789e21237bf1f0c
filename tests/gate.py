"""A gate before an engine: a test in one process says how many calls a server's may make, and sees how many have come.

So a request is in the middle of its steps for as long as a test wants it to be, on a machine of any speed. Two files carry
that: `came` has a byte for each call, `allowed` says how many may pass; without it the gate is open.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_LOOK_EVERY_S = 0.005
_ROOT = Path(__file__).parents[1]


class Gate:
    """For the test. `folder` is where the files are; it exists."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._came = folder / "came"
        self._allowed = folder / "allowed"
        self._came.touch()

    @property
    def came(self) -> int:
        """Calls that have come to the gate so far, with the one that waits there."""
        return self._came.stat().st_size

    @property
    def holds(self) -> bool:
        """Whether a call waits there."""
        return self._allowed.exists() and self.came > int(self._allowed.read_text())

    @contextmanager
    def closed(self, after: int = 0) -> Iterator[Gate]:
        """Lets so many more calls pass and none after them, until the block ends."""
        self.close(after)
        try:
            yield self
        finally:
            self.open()

    def close(self, after: int = 0) -> None:
        """Lets so many more calls pass than have come, or are allowed already."""
        allowed = int(self._allowed.read_text()) if self._allowed.exists() else self.came
        aside = self._allowed.with_suffix(".aside")
        aside.write_text(str(allowed + after))
        aside.replace(self._allowed)

    def open(self) -> None:
        self._allowed.unlink(missing_ok=True)

    def guard(self, repository: Path, model: str = "unet") -> None:
        """Puts the gate before a stage of a model repository."""
        (repository / model / "1" / "model.py").write_text(_STAGE.format(root=str(_ROOT), folder=str(self.folder)))

    def handler(self) -> str:
        """The entry point of an archive for TorchServe with the gate before its UNet. It notes every batch."""
        return _HANDLER.format(root=str(_ROOT), folder=str(self.folder))

    def program(self, code: str) -> str:
        """Code that runs `code` with the gate before the UNets that it loads."""
        return _PROGRAM.format(root=str(_ROOT), folder=str(self.folder)) + code

    @property
    def batches(self) -> list[int]:
        """Requests of each of TorchServe's batches that has been answered."""
        path = self.folder / "batches"
        return [int(line) for line in path.read_text().split()] if path.exists() else []


_STAGE = """
import sys

sys.path.insert(0, {root!r})

from diffuserve.triton.stage import StageModel
from tests.gate import guarded


class TritonPythonModel(StageModel):
    def initialize(self, args):
        super().initialize(args)
        self._engine = guarded(self._engine, {folder!r})
"""
_PROGRAM = """
import sys

sys.path.insert(0, {root!r})

from diffuserve.engines import local
from tests.gate import guarded


def load(path, component, threads, load=local.load_engine):
    engine = load(path, component, threads)
    return guarded(engine, {folder!r}) if path.parent.name == "unet" else engine


local.load_engine = load
"""
_HANDLER = """
import sys

sys.path.insert(0, {root!r})

from diffuserve_handlers import TextToImageHandler
from tests.gate import guarded


class Handler(TextToImageHandler):
    def _initialize(self, context):
        super()._initialize(context)
        engines = self._local._stages._engines
        engines["unet"] = guarded(engines["unet"], {folder!r})

    def handle(self, data, context):
        answers = super().handle(data, context)
        with open({folder!r} + "/batches", "a") as file:
            print(len(data), file=file)
        return answers
"""


def guarded(engine: Callable[[Any], Any], folder: str) -> Callable[[Any], Any]:
    """For the server's process: the engine behind the gate. Its calls come one after another."""
    came, allowed = Path(folder, "came"), Path(folder, "allowed")

    def call(inputs: Any) -> Any:
        with came.open("ab") as file:
            file.write(b".")
        number = came.stat().st_size
        while _allowed(allowed) < number:
            time.sleep(_LOOK_EVERY_S)
        return engine(inputs)

    return call


def _allowed(path: Path) -> float:
    try:
        return int(path.read_text())
    except FileNotFoundError:
        return float("inf")
