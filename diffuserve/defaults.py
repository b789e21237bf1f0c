"""What is taken where nothing else is said."""

from __future__ import annotations

# Seconds after which a stage's call counts as hung.
CALL_TIMEOUT_S = 300.0
# The same on TorchServe, where it is for all calls of a batch: a worker answers nothing before its batch has ended.
BATCH_TIMEOUT_S = 600.0
# How long a server may load its models.
READY_TIMEOUT_S = 600.0
