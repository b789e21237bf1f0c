"""What TensorRT says: to Python's log, as this process says the rest, and its errors kept to be quoted."""

from __future__ import annotations

import functools
import logging
from collections import deque
from typing import Any

log = logging.getLogger(__name__)

# Of one failure TensorRT reports a few, the first being nearest to its cause.
_MOST_ERRORS = 3


@functools.cache
def messages(module: Any) -> Any:
    """The `ILogger` of a library, which takes the first that it is given for good.

    Its `errors` are those said since they were last cleared, the first few.

    Args:
        module: `tensorrt`, or one with the same interface.
    """
    severity = module.ILogger.Severity
    levels = {severity.INTERNAL_ERROR: logging.ERROR, severity.ERROR: logging.ERROR, severity.WARNING: logging.WARNING}

    class Messages(module.ILogger):  # type: ignore[misc]  # untyped
        def __init__(self) -> None:
            super().__init__()  # without it the binding's object does not exist
            self.errors: deque[str] = deque()

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity)
            if level is None:
                return  # thousands a build
            log.log(level, "%s: %s", module.__name__, message)
            if level == logging.ERROR and len(self.errors) < _MOST_ERRORS:
                self.errors.append(message)

    return Messages()
