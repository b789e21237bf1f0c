"""What is taken where nothing else is said: places, below the folder where a command is run, ports and times."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

BUNDLES = Path("model_store/bundles")
ARCHIVES = Path("model_store/mar")
REPOSITORY = Path("triton_repo")
# Where `serve --server torchserve` puts a link to TorchServe's keys, and `generate` looks for them.
KEY_FILE = Path("torchserve-keys.json")
BENCH_RESULTS = Path("bench-results")
LOADTEST_RESULTS = Path("loadtest-results")
TRAINING_RUNS = Path("training-runs")

# The bundled model, which the benchmarks measure.
TINY_CHECKPOINT = Path("model_store/checkpoints/tiny-emoji")
TINY_BUNDLE = BUNDLES / "tiny-emoji"
TINY_ARCHIVE = ARCHIVES / "tiny-emoji.mar"


class Ports(NamedTuple):
    """Where a server listens."""

    http: int
    grpc: int
    metrics: int


# Triton's and TorchServe's own; the one after TorchServe's HTTP and gRPC port each is for management.
TRITON = Ports(8000, 8001, 8002)
TORCHSERVE = Ports(8080, 7070, 8082)

# Seconds after which a stage's call counts as hung.
CALL_TIMEOUT_S = 300.0
# The same on TorchServe, where it is for all calls of a batch: a worker answers nothing before its batch has ended.
BATCH_TIMEOUT_S = 600.0
# How long a server may load its models.
READY_TIMEOUT_S = 600.0
# How long running requests may take once a server is asked to stop.
GRACE_S = 60.0
