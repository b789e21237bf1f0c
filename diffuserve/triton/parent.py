"""The end of a model's process when Triton has gone."""

from __future__ import annotations

import os
import threading
import time

_LOOK_EVERY_S = 1.0


def end_with_parent() -> None:
    """Ends this process within a second or so of Triton's death, however Triton died. Triton 2.51's own watch over its
    models' processes misses some that wait for an answer of Triton's, which then stay for ever."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_EVERY_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()
