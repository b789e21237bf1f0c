"""A run for the terminal, and as one HTML file that needs nothing else."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import click
import msgspec

from diffuserve.files import write_whole
from diffuserve_loadtest.report.found import Found
from diffuserve_loadtest.report.run import Run, write_run
from diffuserve_loadtest.sending.records import OK
from diffuserve_loadtest.workload.files import to_yaml


def publish_run(run: Run, folder: Path, found: Found | None = None) -> None:
    """Prints the summary and writes NAME.json and NAME.html."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in figures_of(run).items():
        click.echo(f"{name:<34} {value}")
    for outcome, count in run.measures.outcomes.items():
        if outcome != OK:
            click.echo(f"{outcome:<34} {count}: {_messages(run).get(outcome, '')}")
    for verdict in run.verdicts:
        click.echo(f"{verdict.term.text:<34} {verdict.words}: {'kept' if verdict.kept else 'BROKEN'}")
    write_run(run, folder / f"{run.name}.json")
    if found is not None:
        click.echo(found.words)
        write_whole(folder / f"{run.name}-tries.json", msgspec.json.format(msgspec.json.encode(found), indent=2))
    write_whole(folder / f"{run.name}.html", html(run, found).encode())
    click.echo(f"Written: {folder / run.name}.html, {folder / run.name}.json")


def html(run: Run, found: Found | None = None) -> str:
    """The whole page."""
    from jinja2 import Environment, StrictUndefined

    from diffuserve_loadtest.report.charts import charts_of

    source = (resources.files("diffuserve_loadtest.report") / "templates" / "report.html.j2").read_text()
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(source)
    return template.render(
        run=run,
        found=found,
        started=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(run.recording.started_at)),
        figures=[{"name": name, "value": value} for name, value in figures_of(run).items()],
        charts=charts_of(run, found),
        messages=_messages(run),
        workload=to_yaml(run.recording.workload),
    )


def figures_of(run: Run) -> dict[str, str]:
    """The figures that matter, in words."""
    measures = run.measures
    figures = {
        "requests after the warm-up": str(sum(measures.outcomes.values())),
        "offered, requests/s": f"{measures.offered_per_s:.3g}",
        "answered, requests/s": f"{measures.throughput_per_s:.3g}",
        "images/s": f"{measures.images_per_s:.3g}",
        "goodput, requests/s": f"{measures.goodput_per_s:.3g}",
        "errors": f"{measures.errors:.2%}",
        "sent late": f"{measures.late:.2%}",
    }
    figures |= {f"latency {name}, s": f"{measures.latency_s[name]:.2f}" for name in measures.latency_s}
    if measures.refusal_s:
        figures["refusal p95, ms"] = f"{1000 * measures.refusal_s['p95']:.0f}"
    if measures.rows_a_call is not None:
        figures["rows of a UNet call"] = f"{measures.rows_a_call:.1f}"
    if measures.shared_rows is not None:
        figures["rows that shared a call"] = f"{measures.shared_rows:.1%}"
    if measures.useful_rows is not None:
        figures["useful of executed rows"] = f"{measures.useful_rows:.1%}"
    if run.capacity_per_s is not None:
        figures["capacity, requests/s"] = f"{run.capacity_per_s:.3g}"
    if run.engine_bound_per_s is not None:
        figures["engine bound, requests/s"] = f"{run.engine_bound_per_s:.3g}"
    if run.serving_efficiency is not None:
        figures["serving efficiency"] = f"{run.serving_efficiency:.1%}"
    return figures


def _messages(run: Run) -> Mapping[str, str]:
    """The first message of each kind of failure."""
    messages: dict[str, str] = {}
    for record in run.recording.records:
        if record.message:
            messages.setdefault(record.outcome, record.message)
    return messages
