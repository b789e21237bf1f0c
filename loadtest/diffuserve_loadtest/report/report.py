"""What a benchmark hands over: tables for the terminal, figures for a JSON file and perhaps a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click


@dataclass(frozen=True)
class Table:
    """`rows` are text, one cell for each name in `header`."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Plot:
    """Lines through points (x, y), by name."""

    lines: Mapping[str, Sequence[tuple[float, float]]]
    x_label: str
    y_label: str
    log_y: bool = False


@dataclass(frozen=True)
class Report:
    """`settings`: what was asked for; `measured`: what came out, ready for JSON; `remarks`: lines below the tables."""

    name: str
    settings: Mapping[str, Any]
    measured: Mapping[str, Any]
    tables: Sequence[Table]
    remarks: Sequence[str] = ()
    plots: Mapping[str, Plot] = field(default_factory=dict)


def publish(report: Report, folder: Path) -> None:
    """Prints the report and writes NAME.json, and NAME-PLOT.png for each plot, into `folder`."""
    from diffuserve_loadtest.report.machine import describe_machine

    machine = describe_machine()
    folder.mkdir(parents=True, exist_ok=True)
    for table in report.tables:
        _print_table(table)
    for remark in report.remarks:
        click.echo(remark)
    click.echo(", ".join(f"{name} {value}" for name, value in machine.items()))
    path = folder / f"{report.name}.json"
    content = {"machine": machine, "settings": dict(report.settings), **report.measured}
    path.write_text(json.dumps(content, indent=2) + "\n")
    click.echo(f"Written: {path}")
    for name, plot in report.plots.items():
        path = folder / f"{report.name}-{name}.png"
        try:
            _draw(plot, path)
        except ModuleNotFoundError as error:  # the figures are what the run was for
            click.echo(f"No plot, since {error.name} is not installed: pip install 'diffuserve[loadtest]'", err=True)
        else:
            click.echo(f"Written: {path}")


def _print_table(table: Table) -> None:
    lines = [table.header, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.header))]
    if table.title:
        click.echo(table.title)
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    click.echo()


def _draw(plot: Plot, path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, points in plot.lines.items():
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o" if len(points) < 20 else "", label=name)
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    if plot.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
