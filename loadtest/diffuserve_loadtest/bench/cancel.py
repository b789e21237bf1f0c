"""What cancelled and finished requests leave behind: rows, tasks and memory."""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffuserve.bundle.manifest import ModelSpec, read_manifest
from diffuserve.triton.address import TritonAddress
from diffuserve.triton.configuration import read_options
from diffuserve.triton.launcher import TritonServer
from diffuserve_client import AsyncClient
from diffuserve_loadtest.bench.cancellation import Cancellations, Freed, cancel_under_load
from diffuserve_loadtest.bench.closed_loop import completions
from diffuserve_loadtest.bench.mixture import Kind, sizes_of
from diffuserve_loadtest.memory import resident_bytes
from diffuserve_loadtest.report import Plot, Report, Table

_PROMPTS = 16  # few, so that the cache of embeddings is full before the first sample
_SAMPLES = 40
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
        samples = asyncio.run(_watch_memory(server, model, requests, in_flight))
    within = sum(freed.steps <= 1 for freed in cancelled.freed)
    return Report(
        "cancel",
        {"bundle": str(bundle), "cancels": cancels, "requests": requests, "in_flight": in_flight},
        {"cancellations": asdict(cancelled), "freed_within_one_step": within, "resident_bytes": samples},
        [_freed_table(cancelled.freed), _memory_table(samples, requests)],
        [
            f"Rows free within one step: {within} of {len(cancelled.freed)}",
            _leaks(cancelled),
        ],
        {"memory": _plot(samples, requests)},
    )


async def _watch_memory(server: TritonServer, model: ModelSpec, requests: int, in_flight: int) -> list[dict[str, int]]:
    """Resident bytes by process, `_SAMPLES` times over the requests, after a warm-up."""
    width, height = sizes_of(model)[1]
    kind = Kind(_SHORT_STEPS, True, width, height)

    def fields() -> Iterator[dict[str, Any]]:
        for number in itertools.count():
            yield {**kind.fields(number), "prompt": f"an apple, number {number % _PROMPTS}"}

    endless = fields()
    samples = []
    async with AsyncClient(server.address.grpc) as client:

        def answer(fields: dict[str, Any]) -> Awaitable[object]:
            return client.generate(**fields)

        await completions(answer, endless, in_flight=in_flight, count=max(_PROMPTS, requests // 20))
        for _ in range(_SAMPLES):
            await completions(answer, endless, in_flight=in_flight, count=max(1, requests // _SAMPLES))
            samples.append(resident_bytes(server.pid))
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


def _memory_table(samples: Sequence[dict[str, int]], requests: int) -> Table:
    rows = []
    for name in sorted(samples[-1]):
        first, last = quarters([sample[name] / 2**20 for sample in samples if name in sample])
        rows.append((name, f"{first:.1f}", f"{last:.1f}", f"{last - first:+.1f}"))
    title = f"Resident memory over {requests} requests of {_SHORT_STEPS} steps, MiB"
    return Table(title, ("process", "first quarter", "last quarter", "difference"), rows)


def _plot(samples: Sequence[dict[str, int]], requests: int) -> Plot:
    lines = {
        name: [
            ((index + 1) * requests / len(samples), sample[name] / 2**20)
            for index, sample in enumerate(samples)
            if name in sample
        ]
        for name in sorted(samples[-1])
    }
    return Plot(lines, "requests answered", "resident memory, MiB")


def _leaks(cancelled: Cancellations) -> str:
    return (
        f"Left when all was cancelled: {cancelled.leaked_requests} requests, {cancelled.leaked_rows} rows of UNet calls"
    )
