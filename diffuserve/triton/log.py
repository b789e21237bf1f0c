"""Python's logging into Triton's log."""

from __future__ import annotations

import logging

import triton_python_backend_utils as pb_utils


class TritonHandler(logging.Handler):
    """Hands records of the `diffuserve` loggers to Triton, so that its log settings hold for them too."""

    def emit(self, record: logging.LogRecord) -> None:
        message = self.format(record)
        if record.levelno >= logging.ERROR:
            pb_utils.Logger.log_error(message)
        elif record.levelno >= logging.WARNING:
            pb_utils.Logger.log_warn(message)
        elif record.levelno >= logging.INFO:
            pb_utils.Logger.log_info(message)
        else:
            pb_utils.Logger.log_verbose(message)


def log_to_triton(model_name: str) -> None:
    """Sends what diffuserve logs in this process to Triton, with the model's name in front."""
    handler = TritonHandler()
    handler.setFormatter(logging.Formatter(f"{model_name}: %(message)s"))
    logger = logging.getLogger("diffuserve")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO)
