"""How the launcher asks the in-flight model to drain, and hears that it has.

On SIGTERM Triton stops its schedulers first, so a running loop's next UNet call would fail: Triton cannot drain a model
that calls others. The launcher therefore asks the model before it stops Triton. Two empty files in a folder that only
this user can enter carry that, since the model's process has no other link to the launcher.
"""

from __future__ import annotations

import os
from pathlib import Path

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
