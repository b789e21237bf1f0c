"""What cancelled and finished requests leave behind: rows, tasks and memory."""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from diffuserve.bundle.manifest import ModelSpec, read_manifest
from diffuserve.triton.address import TritonAddress
from diffuserve.triton.configuration import read_options
from diffuserve.triton.launcher import TritonServer
from diffuserve_bench.cancellation import Cancellations, Freed, cancel_under_load
from diffuserve_bench.mixture import closed, kind_of, sizes_of
from diffuserve_loadtest.report.report import Plot, Report, Table
from diffuserve_loadtest.sending.generator import generate
from diffuserve_loadtest.sending.records import all_answered
from diffuserve_loadtest.sending.target import Target
from diffuserve_loadtest.server.watch import Watch

_PROMPTS = 16  # few, so that the cache of embeddings is full before the first sample
_SHORT_STEPS = 2


def measure_cancel(bundle: Path, repository: Path, *, cancels: int, requests: int, in_flight: int | None) -> Report:
    """Cancels requests under load, then sends many short ones, to one server.

    Args:
        bundle: what the repository was assembled from.
        repository: served as it is.
        cancels: requests that are cancelled midway.
        requests: short ones, over which memory is watched.
        in_flight: requests that keep the server full; by default half as many as the row budget has rows, which is one
            call's worth.
    """
    model = read_manifest(bundle).model
    in_flight = in_flight or max(1, read_options(repository)[0].max_rows // 2)
    with TritonServer(repository, TritonAddress.on_free_ports()) as server:
        cancelled = cancel_under_load(server, model, cancels=cancels, in_flight=in_flight)
        samples = _watch_memory(server, model, requests, in_flight)
    within = sum(freed.steps <= 1 for freed in cancelled.freed)
    return Report(
        "cancel",
        {"bundle": str(bundle), "cancels": cancels, "requests": requests, "in_flight": in_flight},
        {
            "cancellations": asdict(cancelled),
            "freed_within_one_step": within,
            "resident_bytes": [asdict(sample) for sample in samples],
        },
        [_freed_table(cancelled.freed), _memory_table(samples, requests)],
        [
            f"Rows free within one step: {within} of {len(cancelled.freed)}",
            _leaks(cancelled),
        ],
        {"memory": _plot(samples)},
    )


@dataclass(frozen=True)
class MemorySample:
    """Resident bytes by process, when so many requests had been answered."""

    answered: int
    resident_bytes: dict[str, int]


def _watch_memory(server: TritonServer, model: ModelSpec, requests: int, in_flight: int) -> list[MemorySample]:
    """A look every second, after a warm-up."""
    kind = kind_of(_SHORT_STEPS, sizes_of(model)[1])
    known = msgspec.structs.replace(kind, prompt=tuple(f"an apple, number {number}" for number in range(_PROMPTS)))
    warm_up = max(4 * _PROMPTS, requests // 20)
    with Watch(None, server.pid) as watch:
        recording, _ = generate(
            closed([known], in_flight, warm_up + requests), Target("triton-grpc", server.address.grpc)
        )
    done_s = sorted(record.done_s for record in all_answered(recording))
    samples = []
    for look in watch.samples:
        answered = bisect.bisect_right(done_s, look.at_s - recording.started_at) - warm_up
        if answered >= 0:
            samples.append(MemorySample(answered, {name: each.resident_bytes for name, each in look.processes.items()}))
    return samples


def quarters(values: Sequence[float]) -> tuple[float, float]:
    """Means of the first quarter and of the last."""
    size = max(1, len(values) // 4)
    return statistics.mean(values[:size]), statistics.mean(values[-size:])


def _freed_table(freed: Sequence[Freed]) -> Table:
    counts = {steps: sum(one.steps == steps for one in freed) for steps in sorted({one.steps for one in freed})}
    longest_s = {steps: max(one.seconds for one in freed if one.steps == steps) for steps in counts}
    return Table(
        f"{len(freed)} cancelled requests",
        ("UNet calls until the rows were free", "requests", "seconds at most"),
        [(str(steps), str(count), f"{longest_s[steps]:.2f}") for steps, count in counts.items()],
    )


def _memory_table(samples: Sequence[MemorySample], requests: int) -> Table:
    rows = []
    for name in sorted(samples[-1].resident_bytes):
        first, last = quarters([y for _, y in _line(samples, name)])
        rows.append((name, f"{first:.1f}", f"{last:.1f}", f"{last - first:+.1f}"))
    title = f"Resident memory over {requests} requests of {_SHORT_STEPS} steps, MiB"
    return Table(title, ("process", "first quarter", "last quarter", "difference"), rows)


def _plot(samples: Sequence[MemorySample]) -> Plot:
    lines = {name: _line(samples, name) for name in sorted(samples[-1].resident_bytes)}
    return Plot(lines, "requests answered", "resident memory, MiB")


def _line(samples: Sequence[MemorySample], name: str) -> list[tuple[float, float]]:
    """Requests answered, and MiB of a process."""
    return [
        (sample.answered, sample.resident_bytes[name] / 2**20) for sample in samples if name in sample.resident_bytes
    ]


def _leaks(cancelled: Cancellations) -> str:
    return (
        f"Left when all was cancelled: {cancelled.leaked_requests} requests, {cancelled.leaked_rows} rows of UNet calls"
    )
