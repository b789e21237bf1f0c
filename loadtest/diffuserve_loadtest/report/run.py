"""One run of a workload: all that the report shows and `compare` reads, and its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from diffuserve.files import write_whole
from diffuserve_loadtest.report.measures import Measures
from diffuserve_loadtest.report.slo import Slo, Verdict
from diffuserve_loadtest.sending.records import Recording
from diffuserve_loadtest.server.watch import Sample

FORMAT_VERSION = 1


class Run(msgspec.Struct, frozen=True):
    """Everything about one run; what the report shows and `compare` reads.

    Attributes:
        format_version: of this file.
        name: the workload's.
        machine: as of `describe_machine`.
        server: the protocol and address.
        kept_up: whether the generator did.
        capacity_per_s: what a load of 1 is; None if it was not needed.
        engine_bound_per_s: requests per second of the engines alone; None if they were not timed.
        recording, samples: the raw material.
        measures, slo, verdicts: what they come to.
    """

    format_version: int
    name: str
    machine: Mapping[str, str]
    server: str
    kept_up: bool
    capacity_per_s: float | None
    recording: Recording
    samples: Sequence[Sample]
    measures: Measures
    slo: Slo
    verdicts: Sequence[Verdict]
    engine_bound_per_s: float | None = None

    @property
    def slo_kept(self) -> bool:
        return all(verdict.kept for verdict in self.verdicts)

    @property
    def serving_efficiency(self) -> float | None:
        """What the server answers when it is full, or answered in this run if that is not known, of the engines' bound."""
        if self.engine_bound_per_s is None:
            return None
        return (self.capacity_per_s or self.measures.throughput_per_s) / self.engine_bound_per_s


def write_run(run: Run, path: Path) -> None:
    """JSON, whole or not at all."""
    write_whole(path, msgspec.json.encode(run))


def read_run(path: Path) -> Run:
    """Raises `OSError`, or `msgspec.DecodeError` if it is not a run or of another version."""
    run = msgspec.json.decode(path.read_bytes(), type=Run)
    if run.format_version != FORMAT_VERSION:
        raise msgspec.DecodeError(f"{path} has the format {run.format_version}; this version reads {FORMAT_VERSION}")
    return run
