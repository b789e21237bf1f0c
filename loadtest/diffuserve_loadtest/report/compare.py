"""Two runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np

from diffuserve_loadtest.report.report import Plot, Report, Table
from diffuserve_loadtest.report.run import Run
from diffuserve_loadtest.sending.records import OK, counted_of
from diffuserve_loadtest.workload.workload import Workload

_LOWER_IS_BETTER = ("mean", "p50", "p90", "p95", "p99", "p99.9", "max")


def comparison_of(first: Run, second: Run, names: tuple[str, str]) -> Report:
    """A table with ratios, second over first, and the latency distributions over each other."""
    rows = [
        _row("answered, requests/s", first.measures.throughput_per_s, second.measures.throughput_per_s),
        _row("images/s", first.measures.images_per_s, second.measures.images_per_s),
        _row("goodput, requests/s", first.measures.goodput_per_s, second.measures.goodput_per_s),
        *(
            _row(f"latency {name}, s", first.measures.latency_s[name], second.measures.latency_s[name])
            for name in _LOWER_IS_BETTER
            if name in first.measures.latency_s and name in second.measures.latency_s
        ),
        ("errors", f"{first.measures.errors:.2%}", f"{second.measures.errors:.2%}", ""),
        _row("rows of a UNet call", first.measures.rows_a_call, second.measures.rows_a_call),
        _row("useful of executed rows", first.measures.useful_rows, second.measures.useful_rows),
        _row("peak memory, MiB", _peak_mib(first), _peak_mib(second)),
    ]
    return Report(
        "compare",
        {"first": names[0], "second": names[1]},
        {"rows": [list(row) for row in rows], "differences": differences(first, second)},
        [Table("", ("", *names, "ratio"), rows)],
        remarks=[f"Warning: {difference}" for difference in differences(first, second)],
        plots={
            "latency": Plot(
                {name: _distribution(run) for name, run in zip(names, (first, second), strict=True)},
                "latency, s",
                "answered within, %",
            )
        },
    )


def differences(first: Run, second: Run) -> list[str]:
    """Why the ratios may say nothing, in words."""
    found = []
    for name in sorted(first.machine.keys() | second.machine.keys()):
        one, other = first.machine.get(name, "none"), second.machine.get(name, "none")
        if one != other:
            found.append(f"{name} is {one} in the first run and {other} in the second.")
    workloads = first.recording.workload, second.recording.workload
    changed = [
        name for name in Workload.__struct_fields__ if len({repr(getattr(each, name)) for each in workloads}) > 1
    ]
    if changed:
        found.append(f"the workloads differ in {', '.join(changed)}.")
    for title, run in (("first", first), ("second", second)):
        if not run.kept_up:
            found.append(f"the generator of the {title} run could not keep up.")
    return found


def _row(name: str, one: float | None, other: float | None) -> tuple[str, ...]:
    cells = ["" if value is None else f"{value:.3g}" for value in (one, other)]
    ratio = f"{other / one:.2f}" if one and other is not None else ""
    return (name, *cells, ratio)


def _peak_mib(run: Run) -> float | None:
    peaks = [sample.proportional_bytes for sample in run.samples if sample.processes]
    return max(peaks) / 2**20 if peaks else None


def _distribution(run: Run) -> Sequence[tuple[float, float]]:
    values = np.sort([record.latency_s for record in counted_of(run.recording) if record.outcome == OK])
    return [(float(value), 100 * (index + 1) / len(values)) for index, value in enumerate(values)]


def read_for_comparison(path: Path) -> Run:
    """Raises `click.ClickException`: it is not a run's JSON."""
    import msgspec

    from diffuserve_loadtest.report.run import read_run

    try:
        return read_run(path)
    except (OSError, msgspec.DecodeError) as error:
        raise click.ClickException(f"{path} cannot be compared: {error}") from None
