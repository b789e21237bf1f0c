"""`diffuserve bench`: a table on the terminal, JSON on disk."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

_BUNDLE = click.option(
    "--bundle", type=click.Path(path_type=Path), default=Path("model_store/bundles/tiny-emoji"), show_default=True
)
_REPOSITORY = click.option(
    "--repository", type=click.Path(path_type=Path), default=Path("triton_repo"), show_default=True
)
_OUTPUT = click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("bench-results"),
    show_default=True,
    help="Folder for the JSON.",
)


@click.group("bench", short_help="Measure, two things against each other in one run.")
def command() -> None:
    """Benchmarks. Each compares two things in one run and says on what machine."""


@command.command("overhead")
@_BUNDLE
@_REPOSITORY
@_OUTPUT
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True)
@click.option("--guidance-scale", type=click.FloatRange(0), default=5.0, show_default=True)
@click.option("--runs", type=click.IntRange(1), default=30, show_default=True, help="Of each kind.")
def overhead(bundle: Path, repository: Path, output: Path, steps: int, guidance_scale: float, runs: int) -> None:
    """One request alone: served by Triton, against the same stages in this process."""
    from diffuserve_loadtest.overhead import measure_overhead

    result = measure_overhead(bundle, repository, steps=steps, guidance_scale=guidance_scale, runs=runs)
    rows = [
        (name, f"{statistics.median(times_s):.3f}", f"{min(times_s):.3f}", f"{max(times_s):.3f}")
        for name, times_s in (("in process", result.local_s), ("served", result.served_s))
    ]
    _print_table(("seconds", "median", "min", "max"), rows)
    click.echo(f"served / in process: {result.ratio:.2f}")
    measured = {
        "settings": result.settings,
        "local_s": result.local_s,
        "served_s": result.served_s,
        "ratio": result.ratio,
    }
    _write(output / "overhead.json", measured)


def _print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def _write(path: Path, measured: dict[str, Any]) -> None:
    from diffuserve_loadtest.machine import describe_machine

    machine = describe_machine()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, **measured}, indent=2) + "\n")
    click.echo(", ".join(f"{name} {value}" for name, value in machine.items()))
    click.echo(f"Written: {path}")
