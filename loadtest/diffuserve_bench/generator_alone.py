"""The load generator alone, against a stub that answers at once: whatever it measures later, it is not itself."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import psutil

from diffuserve_loadtest.report.report import Report, Table
from diffuserve_loadtest.report.summary import HEADER, Summary, summarise
from diffuserve_loadtest.sending.generator import generate
from diffuserve_loadtest.sending.records import OK, counted_of
from diffuserve_loadtest.sending.target import Protocol, Target
from diffuserve_loadtest.server.stub import stub
from diffuserve_loadtest.workload.arrivals import Constant
from diffuserve_loadtest.workload.workload import Requests, Workload

_PROTOCOLS: tuple[Protocol, ...] = ("triton-grpc", "triton-http", "triton-stream")
_DELAYS_S = (0.0, 1.0)
"""Before the stub answers: at once, so that little is in flight, and as late as a server, so that hundreds are."""
_WARM_UP_S = 5.0


def measure_generator(*, rate_per_s: float, seconds: float, workers: int) -> Report:
    """Constant arrivals of requests that are answered with a picture of noise of about 49 KB, which is decoded.

    Args:
        rate_per_s: requests per second.
        seconds: after the warm-up, of each protocol and delay.
        workers: processes that send.
    """
    measured = {
        f"{protocol} after {delay_s:g} s": _measure(protocol, delay_s, rate_per_s, seconds, workers)
        for protocol in _PROTOCOLS
        for delay_s in _DELAYS_S
    }
    rows = [
        (
            name,
            f"{found['answered_per_s']:.1f}",
            f"{found['late']:.2%}",
            str(found["errors"]),
            f"{found['answer_bytes'] / 1000:.0f}",
            *Summary(**found["added_ms"]).cells(),
            f"{found['cpu_ms']:.1f}",
            "yes" if found["kept_up"] else "no",
        )
        for name, found in measured.items()
    ]
    header = (
        "protocol, answered",
        "answered/s",
        "late",
        "errors",
        "KB",
        *(f"{name} ms" for name in HEADER),
        "CPU ms a request",
        "kept up",
    )
    title = (
        f"{rate_per_s:g} requests/s for {seconds:g} s from {workers} process(es), stub on the same machine; latencies beyond "
        "the stub's delay"
    )
    settings = {"rate_per_s": rate_per_s, "seconds": seconds, "workers": workers}
    return Report("generator", settings, measured, [Table(title, header, rows)])


def _measure(protocol: Protocol, delay_s: float, rate_per_s: float, seconds: float, workers: int) -> dict[str, Any]:
    workload = Workload(
        "The generator alone.",
        Constant(rate_per_s=rate_per_s),
        (Requests(steps=1),),
        duration_s=_WARM_UP_S + seconds,
        warm_up_s=_WARM_UP_S,
        patience_s=10.0,
    )
    with stub("--delay-s", str(delay_s)) as (grpc, http):
        target = Target(protocol, grpc if protocol == "triton-grpc" else http)
        before_s = _children_cpu_s()
        recording, kept_up = generate(workload, target, workers=workers)
        cpu_s = _children_cpu_s() - before_s
    counted = counted_of(recording)
    answered = [record for record in counted if record.outcome == OK]
    return {
        "answered_per_s": len(answered) / seconds,
        "late": sum(record.late for record in counted) / len(counted),
        "unsent": recording.unsent,
        "errors": len(counted) - len(answered),
        "answer_bytes": sum(record.size_bytes for record in answered) / len(answered),
        "added_ms": asdict(summarise([1000 * (record.latency_s - delay_s) for record in answered])),
        "cpu_ms": 1000 * cpu_s / len(recording.records),
        "kept_up": kept_up,
    }


def _children_cpu_s() -> float:
    """Processor time of this process's children that have ended: of the generator, since the stub runs on."""
    times: Any = psutil.Process().cpu_times()
    return float(times.children_user + times.children_system)
