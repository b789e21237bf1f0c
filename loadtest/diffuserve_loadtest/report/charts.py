"""The report's plots, as SVG text that stands in the page itself."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diffuserve_loadtest.report.found import Found
from diffuserve_loadtest.report.run import Run
from diffuserve_loadtest.sending.records import CANCELLED, OK, Record

_SIZE_IN = (6.4, 3.2)
_COLOURS = ("#2f6fde", "#e07b39", "#3d9970", "#b0419b", "#8c6d1f", "#d1495b", "#5b7083")
_GREY = "#8a8f98"  # readable on white and on black
_BINS = 40
_GROUP = 10  # answers, at least, of which a percentile is drawn


def charts_of(run: Run, found: Found | None = None) -> dict[str, str]:
    """SVG by title, those left out for which there is nothing to draw."""
    drawings: dict[str, Callable[[Any], bool]] = {
        "Latency over time": lambda axes: _latency_over_time(axes, run),
        "Latency distribution": lambda axes: _distribution(axes, run),
        "Latency against offered rate": lambda axes: _latency_by_rate(axes, run, found),
        "Throughput": lambda axes: _throughput(axes, run),
        "Requests waiting and running": lambda axes: _gauges(axes, run, ("requests_waiting", "requests_running")),
        "UNet batch sizes": lambda axes: _batch_sizes(axes, run),
        "Errors by kind": lambda axes: _errors(axes, run),
        "Resident memory": lambda axes: _memory(axes, run),
    }
    charts = {}
    for title, draw in drawings.items():
        if svg := _svg(title, draw):
            charts[title] = svg
    return charts


def _svg(title: str, draw: Callable[[Any], bool]) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Text stays text, in the page's own font; ids from a fixed salt, so that the same run gives the same page.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9, "axes.prop_cycle": _cycle()}):
        figure = Figure(figsize=_SIZE_IN, layout="constrained")
        axes = figure.add_subplot()
        if not draw(axes):
            return ""
        _dress(axes)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    return re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', ' width="100%"', svg[svg.index("<svg") :], count=1)


def _cycle() -> Any:
    from cycler import cycler

    return cycler(color=_COLOURS)


def _dress(axes: Any) -> None:
    axes.grid(alpha=0.25, color=_GREY)
    axes.tick_params(colors=_GREY)
    for spine in axes.spines.values():
        spine.set_color(_GREY)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(_GREY)
    if names := axes.get_legend_handles_labels()[1]:
        # Above the plot, where it covers nothing.
        columns = 3 if max(map(len, names)) < 20 else 2
        legend = axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns)
        for text in legend.get_texts():
            text.set_color(_GREY)


def _answered(run: Run) -> list[Record]:
    return [record for record in run.recording.records if record.outcome == OK]


def _warm_up(axes: Any, run: Run) -> None:
    if run.recording.workload.warm_up_s:
        axes.axvspan(0, run.recording.workload.warm_up_s, color=_GREY, alpha=0.12, linewidth=0)


def _latency_over_time(axes: Any, run: Run) -> bool:
    """Every answer, and the median and the 95th percentile of those that were due at about the same time."""
    answered = sorted(_answered(run), key=lambda record: record.due_s)
    if not answered:
        return False
    due_s, latency_s = np.array([(record.due_s, record.latency_s) for record in answered]).T
    axes.scatter(due_s, latency_s, s=min(30, 4 + 2000 / len(due_s)), alpha=0.6, linewidths=0, color=_COLOURS[0])
    groups = np.array_split(np.arange(len(due_s)), max(1, min(_BINS, len(due_s) // _GROUP)))
    if len(groups) > 1:
        middle = [due_s[group].mean() for group in groups]
        for percent, colour in ((50, _COLOURS[2]), (95, _COLOURS[1])):
            values = [np.percentile(latency_s[group], percent) for group in groups]
            axes.plot(middle, values, color=colour, label=f"p{percent}")
    _warm_up(axes, run)
    axes.set(xlabel="due, s after the start", ylabel="latency, s")
    axes.set_ylim(bottom=0)
    return True


def _distribution(axes: Any, run: Run) -> bool:
    warm_up_s = run.recording.workload.warm_up_s
    kinds: dict[str, list[float]] = {"all": []}
    for record in _answered(run):
        if record.due_s >= warm_up_s:
            kinds["all"].append(record.latency_s)
            kinds.setdefault(record.kind, []).append(record.latency_s)
    if not kinds["all"]:
        return False
    shown = dict(list(kinds.items())[:1])
    most = sorted(list(kinds.items())[1:], key=lambda item: -len(item[1]))
    shown |= dict(most[:5]) if len(most) > 1 else {}
    for name, values in shown.items():
        ordered = np.sort(values)
        share = np.arange(1, len(ordered) + 1) / len(ordered)
        axes.step(ordered, 100 * share, where="post", label=name, linewidth=2 if name == "all" else 1)
    axes.set(xlabel="latency, s", ylabel="answered within, %", ylim=(0, 101))
    axes.set_xlim(left=0)
    return True


def _latency_by_rate(axes: Any, run: Run, found: Found | None) -> bool:
    """From the tries of a search; else, where the rate changed, of groups of requests that were due one after the other."""
    if found is not None:
        tries = sorted((each for each in found.tries if each.latency_s), key=lambda each: each.rate_per_s)
        for name in ("p50", "p95", "p99"):
            axes.plot(
                [each.rate_per_s for each in tries], [each.latency_s[name] for each in tries], marker="o", label=name
            )
        if found.rate_per_s is not None:
            axes.axvline(found.rate_per_s, color=_GREY, linestyle="--", label="highest that kept the SLO")
        axes.set(xlabel="offered, requests/s", ylabel="latency, s")
        axes.set_ylim(bottom=0)
        return bool(tries)
    rate = getattr(run.recording.workload.arrivals, "rate_per_s", None)
    answered = sorted(_answered(run), key=lambda record: record.due_s)
    if not isinstance(rate, tuple) or not answered:
        return False
    due_s, latency_s = np.array([(record.due_s, record.latency_s) for record in answered]).T
    rates = np.interp(due_s, (0, run.recording.workload.duration_s), rate)
    groups = np.array_split(np.arange(len(due_s)), max(1, min(_BINS, len(due_s) // _GROUP)))
    for percent in (50, 95):
        values = [np.percentile(latency_s[group], percent) for group in groups]
        axes.plot([rates[group].mean() for group in groups], values, marker="o", label=f"p{percent}")
    axes.set(xlabel="offered, requests/s", ylabel="latency, s")
    axes.set_ylim(bottom=0)
    return True


def _throughput(axes: Any, run: Run) -> bool:
    records = run.recording.records
    if not records:
        return False
    end_s = max(record.done_s for record in records)
    width_s = max(1.0, end_s / _BINS)
    edges = np.arange(0, end_s + width_s, width_s)
    for name, times in (
        ("offered", [record.due_s for record in records]),
        ("answered", [record.done_s for record in records if record.outcome == OK]),
        ("failed or refused", [record.done_s for record in records if record.outcome not in (OK, CANCELLED)]),
    ):
        if times:
            axes.plot(edges[:-1] + width_s / 2, np.histogram(times, edges)[0] / width_s, label=name)
    _warm_up(axes, run)
    axes.set(xlabel="s after the start", ylabel="requests/s")
    axes.set_ylim(bottom=0)
    return True


def _gauges(axes: Any, run: Run, names: Sequence[str]) -> bool:
    start = run.recording.started_at
    drawn = False
    for name in names:
        points = [(sample.at_s - start, sample.metrics[name]) for sample in run.samples if name in sample.metrics]
        if points:
            axes.plot(*zip(*points, strict=True), label=name.replace("requests_", ""))
            drawn = True
    _warm_up(axes, run)
    axes.set(xlabel="s after the start", ylabel="requests")
    axes.set_ylim(bottom=0)
    return drawn


def _batch_sizes(axes: Any, run: Run) -> bool:
    counts = batch_sizes(run)
    if not counts:
        return False
    axes.bar(list(counts), list(counts.values()), color=_COLOURS[0])
    axes.set(xlabel="rows of a UNet call", ylabel="calls")
    return True


def batch_sizes(run: Run) -> dict[str, float]:
    """UNet calls of the run by their number of rows, in words such as 5-8."""
    cumulative = [sample.buckets["unet_call_rows"] for sample in run.samples if "unet_call_rows" in sample.buckets]
    if not cumulative:
        return {}
    first, last = run.samples[0].buckets.get("unet_call_rows", {}), cumulative[-1]
    counts, below, lowest = {}, 0.0, 1
    for bound in sorted(last, key=float):
        upto = last[bound] - first.get(bound, 0.0)
        if bound == "+Inf":
            words = f"{lowest} or more"
        else:
            highest = int(float(bound))
            words = f"{lowest}-{highest}" if lowest < highest else f"{highest}"
            lowest = highest + 1
        counts[words] = upto - below
        below = upto
    used = [index for index, count in enumerate(counts.values()) if count]
    return dict(list(counts.items())[: used[-1] + 1]) if used else {}


def _errors(axes: Any, run: Run) -> bool:
    kinds: Mapping[str, int] = {
        name: count for name, count in run.measures.outcomes.items() if name not in (OK, CANCELLED)
    }
    if not kinds:
        return False
    axes.barh(list(kinds), list(kinds.values()), color=_COLOURS[5])
    axes.set(xlabel="requests after the warm-up")
    return True


def _memory(axes: Any, run: Run) -> bool:
    start = run.recording.started_at
    names = sorted({name for sample in run.samples for name in sample.processes})
    for name in names:
        points = [
            (sample.at_s - start, sample.processes[name].resident_bytes / 2**20)
            for sample in run.samples
            if name in sample.processes
        ]
        axes.plot(*zip(*points, strict=True), label=name)
    _warm_up(axes, run)
    axes.set(xlabel="s after the start", ylabel="MiB")
    axes.set_ylim(bottom=0)
    return bool(names)
