"""What a model's process takes over from a Triton that already serves, when a stage is loaded again."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_STANDARD_STREAMS = 3


def close_inherited_sockets() -> None:
    """Closes every socket of this process; for the start, before it has any of its own.

    Triton 2.51 leaves its ports and connections open in a process that it starts. A client whose connection Triton then
    closes would not be told, and the ports would stay taken for as long as the process outlives Triton.
    """
    for entry in Path("/proc/self/fd").iterdir():
        number = int(entry.name)
        with contextlib.suppress(OSError):  # the one through which the folder is read is closed by now
            if number >= _STANDARD_STREAMS and entry.readlink().name.startswith("socket:"):
                os.close(number)
