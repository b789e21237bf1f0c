"""What is missing for an engine to run on this machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Unavailable:
    """Why an engine cannot run here, and the command or step that fixes it."""

    reason: str
    fix: str

    def __str__(self) -> str:
        return f"{self.reason} ({self.fix})"


NO_GPU = Unavailable(
    "no NVIDIA GPU can be seen", "use a machine with one and its driver; in a container: docker run --gpus all"
)
