"""What a recording and the samples of its run come to. docs/benchmarks.md says in two lines what each measure is for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from diffuserve.errors import DiffuserveError, Draining, QueueFull
from diffuserve_loadtest.report.slo import Slo
from diffuserve_loadtest.sending.records import CANCELLED, OK, Record, Recording, counted_of
from diffuserve_loadtest.server.watch import Sample

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
_REFUSALS = (QueueFull.code, Draining.code)


class NothingMeasured(DiffuserveError):
    """No request was due after the warm-up."""

    code = "nothing_measured"


class Memory(msgspec.Struct, frozen=True):
    """Resident bytes of one process: means of the first and of the last quarter of the samples after the warm-up."""

    first_bytes: float
    last_bytes: float
    peak_bytes: int

    @property
    def growth(self) -> float:
        """0.05 for 5 percent."""
        return self.last_bytes / self.first_bytes - 1


class Measures(msgspec.Struct, frozen=True):
    """The warm-up is left out, but of the rows, which are the server's own counts over the whole run.

    Attributes:
        window_s: seconds between the warm-up and the end of sending.
        offered_per_s: requests that were due in the window.
        outcomes: requests by `Record.outcome`.
        latency_s: of answered requests, from when they were due: mean, max and percentiles by name (p50).
        throughput_per_s, images_per_s: answers that came within the window.
        goodput_per_s: those of them that were within the SLO's latency bound and their own timeout.
        errors, refused, late: shares of the requests that were not cancelled.
        unsent: requests that the generator could not send.
        refusal_s: time to a refusal, p50 and p95; None if nothing was refused.
        rows_a_call: mean rows of a UNet call; None without metrics, as the next two.
        shared_rows: rows executed over rows that could have been, in calls that were made.
        useful_rows: rows of answered requests over rows executed (batch-mixing efficiency).
        memory: by process.
        open_files: by process, before and after.
        shared_memory_files: before and after.
    """

    window_s: float
    offered_per_s: float
    outcomes: Mapping[str, int]
    latency_s: Mapping[str, float]
    throughput_per_s: float
    images_per_s: float
    goodput_per_s: float
    errors: float
    refused: float
    late: float
    unsent: int
    refusal_s: Mapping[str, float] | None
    rows_a_call: float | None
    shared_rows: float | None
    useful_rows: float | None
    memory: Mapping[str, Memory]
    open_files: Mapping[str, tuple[int, int]]
    shared_memory_files: tuple[int, int]


def values_for(slo: Slo, measures: Measures, recording: Recording) -> dict[str, float | None]:
    """What was measured of each of an SLO's terms, by measure; None for latencies where nothing was answered."""
    answered = [record.latency_s for record in counted_of(recording) if record.outcome == OK]
    values: dict[str, float | None] = {
        "errors": measures.errors,
        "refused": measures.refused,
        "late": measures.late,
        "throughput": measures.throughput_per_s,
        "goodput": measures.goodput_per_s,
        **measures.latency_s,
    }
    for term in slo.terms:
        if term.measure not in values:
            known = answered and term.measure.startswith("p")
            percent = float(term.measure.removeprefix("p")) if known else 0.0
            values[term.measure] = float(np.percentile(answered, percent)) if known else None
    return values


def measure(recording: Recording, samples: Sequence[Sample], slo: Slo) -> Measures:
    """Raises `NothingMeasured`."""
    workload = recording.workload
    window_s = workload.duration_s - workload.warm_up_s
    counted = counted_of(recording)
    if not counted:
        raise NothingMeasured(
            f"No request was due in the {window_s:.3g} s after the warm-up. Make the run longer (--duration) or the rate higher."
        )
    asked = [record for record in counted if record.outcome != CANCELLED]
    answered = [record for record in asked if record.outcome == OK]
    # A rate counts what ended within the window, whenever it began.
    in_window = [
        record
        for record in recording.records
        if record.outcome == OK and workload.warm_up_s <= record.done_s < workload.duration_s
    ]
    good = [record for record in in_window if _in_time(record, recording, slo)]
    refused = [record for record in asked if record.outcome in _REFUSALS]
    rows = _Rows.between(samples, recording)
    return Measures(
        window_s=window_s,
        offered_per_s=len(counted) / window_s,
        outcomes=dict(Counter(record.outcome for record in counted).most_common()),
        latency_s=latencies([record.latency_s for record in answered]),
        throughput_per_s=len(in_window) / window_s,
        images_per_s=sum(record.images for record in in_window) / window_s,
        goodput_per_s=len(good) / window_s,
        errors=_share(len(asked) - len(answered), len(asked)),
        refused=_share(len(refused), len(asked)),
        late=_share(sum(record.late for record in counted), len(counted)),
        unsent=recording.unsent,
        refusal_s=latencies([record.done_s - record.sent_s for record in refused]) if refused else None,
        rows_a_call=rows.a_call,
        shared_rows=rows.shared,
        useful_rows=rows.useful,
        memory=_memory(samples, recording.started_at + workload.warm_up_s),
        open_files=_open_files(samples),
        shared_memory_files=((samples[0].shared_memory_files, samples[-1].shared_memory_files) if samples else (0, 0)),
    )


def latencies(values_s: Sequence[float]) -> dict[str, float]:
    """Mean, max and percentiles, interpolated between neighbours; empty if there are no values."""
    if not values_s:
        return {}
    percentiles = np.percentile(values_s, PERCENTILES)
    named = {_name(percent): float(value) for percent, value in zip(PERCENTILES, percentiles, strict=True)}
    return {"mean": float(np.mean(values_s)), **named, "max": max(values_s)}


def _name(percent: float) -> str:
    return f"p{percent:g}"


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _in_time(record: Record, recording: Recording, slo: Slo) -> bool:
    bound_s = slo.latency_bound_s
    return bound_s is None or record.latency_s < bound_s


class _Rows(msgspec.Struct, frozen=True):
    a_call: float | None = None
    shared: float | None = None
    useful: float | None = None

    @classmethod
    def between(cls, samples: Sequence[Sample], recording: Recording) -> _Rows:
        """From the first sample to the last; nothing if the server was started anew meanwhile or has no metrics.

        What the first sample does not have was 0 then: TorchServe shows no counter before it has counted something.
        """
        with_metrics = [sample.metrics for sample in samples if "unet_rows" in sample.metrics]
        if not with_metrics:
            return cls()
        first, last = samples[0].metrics, with_metrics[-1]
        calls, executed, shareable = (
            last.get(name, 0) - first.get(name, 0) for name in ("unet_calls", "unet_rows", "unet_rows_shareable")
        )
        if calls <= 0 or executed <= 0:
            return cls()
        useful = sum(record.unet_rows for record in recording.records if record.outcome == OK)
        return cls(executed / calls, executed / shareable if shareable else None, useful / executed)


def _memory(samples: Sequence[Sample], after: float) -> dict[str, Memory]:
    later = [sample for sample in samples if sample.at_s >= after]
    found: dict[str, list[int]] = {}
    for sample in later:
        for name, process in sample.processes.items():
            found.setdefault(name, []).append(process.resident_bytes)
    return {
        name: Memory(
            float(np.mean(sizes[: max(1, len(sizes) // 4)])),
            float(np.mean(sizes[-max(1, len(sizes) // 4) :])),
            max(sizes),
        )
        for name, sizes in found.items()
    }


def _open_files(samples: Sequence[Sample]) -> dict[str, tuple[int, int]]:
    if not samples:
        return {}
    first, last = samples[0].processes, samples[-1].processes
    return {name: (first[name].open_files, last[name].open_files) for name in first if name in last}
