"""Recordings and samples with known answers."""

from __future__ import annotations

from collections.abc import Sequence

from diffuserve_loadtest.report.machine import describe_machine
from diffuserve_loadtest.report.measures import measure, values_for
from diffuserve_loadtest.report.run import FORMAT_VERSION, Run
from diffuserve_loadtest.report.slo import slo_from_text
from diffuserve_loadtest.sending.records import OK, Record, Recording
from diffuserve_loadtest.server.watch import Process, Sample
from diffuserve_loadtest.workload.arrivals import Poisson
from diffuserve_loadtest.workload.workload import Requests, Workload

STARTED_AT = 1_700_000_000.0


def record(due_s: float, latency_s: float, outcome: str = OK, *, late_s: float = 0.0, message: str = "") -> Record:
    """Guided, of ten steps, with one image if it was answered."""
    images = int(outcome == OK)
    return Record(
        due_s, due_s + late_s, due_s + latency_s, "10 steps, guided", outcome, 20, images, 1000 * images, message
    )


def recording(
    records: Sequence[Record], *, duration_s: float = 110.0, warm_up_s: float = 10.0, unsent: int = 0
) -> Recording:
    workload = Workload(
        "Made up.",
        Poisson(rate_per_s=1.0),
        (Requests(prompt="<b>secret</b>", steps=10),),
        duration_s=duration_s,
        warm_up_s=warm_up_s,
    )
    return Recording(STARTED_AT, workload, records, unsent)


def sample(at_s: float, resident_bytes: int = 100, open_files: int = 7, files: int = 0, **metrics: float) -> Sample:
    """`at_s` after the start of the run; UNet calls have 3 or 4 rows."""
    calls = metrics.get("unet_calls", 0.0)
    buckets = {"unet_call_rows": {"1.0": 0.0, "2.0": 0.0, "4.0": calls, "+Inf": calls}} if metrics else {}
    process = Process(resident_bytes, resident_bytes, open_files, 3)
    return Sample(STARTED_AT + at_s, metrics, buckets, {"unet": process}, files)


def run(records: Sequence[Record], samples: Sequence[Sample] = (), slo: str = "", *, kept_up: bool = True) -> Run:
    made, promised = recording(records), slo_from_text(slo)
    measures = measure(made, samples, promised)
    verdicts = promised.judge(values_for(promised, measures, made))
    return Run(
        FORMAT_VERSION,
        "made-up",
        describe_machine(),
        "triton-grpc 127.0.0.1:8001",
        kept_up,
        None,
        made,
        samples,
        measures,
        promised,
        verdicts,
    )
