"""What an engine lacks to run on this machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lack:
    """Why an engine cannot run here, and the command or step that mends it."""

    reason: str
    mend: str

    def __str__(self) -> str:
        return f"{self.reason} ({self.mend})"


NO_GPU = Lack(
    "no NVIDIA GPU can be seen", "use a machine with one and its driver; in a container: docker run --gpus all"
)
