"""The record of runs as tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffuserve_bench.gpu.phases import PHASES

Lines = Sequence[Mapping[str, Any]]
# What a table's columns stand for, the first of these that a figure has.
_COLUMNS = ("rows", "images", "batch", "load")
_CEILING = "matrix product"
_MACHINE = ("processor", "cores", "driver", "memory", "sm_clock_max", "power_limit", "python", "torch", "onnxruntime")


@dataclass
class _Table:
    """Figures of a phase that have the same columns: a line for each figure with the same other settings."""

    across: str | None
    columns: list[Any] = field(default_factory=list)
    cells: dict[tuple[str, str, str], dict[Any, str]] = field(default_factory=dict)

    def add(self, figure: Mapping[str, Any]) -> None:
        """The last of several measurements of the same counts."""
        settings = dict(figure["settings"])
        column = settings.pop(self.across, "") if self.across else "value"
        if column not in self.columns:
            self.columns.append(column)
        line = (figure["figure"], ", ".join(f"{key} {value}" for key, value in settings.items()), figure["unit"])
        self.cells.setdefault(line, {})[column] = _number(figure["value"])

    def markdown(self) -> Iterator[str]:
        columns = sorted(self.columns) if self.across else self.columns
        named = [f"{self.across} {column}" if self.across else column for column in columns]
        yield _line(["figure", "of", "unit", *named])
        yield "|" + "---|" * (3 + len(columns))
        for (figure, settings, unit), values in self.cells.items():
            yield _line([figure, settings, unit, *(values.get(column, "") for column in columns)])


def markdown(lines: Lines) -> str:
    """Args:
    lines: of one run's file, or of several, as `read_lines` gives them.
    """
    parts = ["\n".join(_machine(line)) for line in lines if line["kind"] == "machine"]
    figures = [line for line in lines if line["kind"] == "figure"]
    figures += _shares(figures)
    names = [phase.name for phase in PHASES]
    phases = sorted(
        {line["phase"] for line in lines if "phase" in line},
        key=lambda name: names.index(name) if name in names else len(names),
    )
    for phase in phases:
        parts.append(f"## {phase}\n")
        parts.append("\n".join(_remarks(phase, lines)))
        parts += _tables([figure for figure in figures if figure["phase"] == phase])
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _machine(line: Mapping[str, Any]) -> Iterator[str]:
    known = ", ".join(f"{name} {line[name]}" for name in _MACHINE if line.get(name))
    yield f"{line.get('card') or 'No GPU'}; {known}."


def _remarks(phase: str, lines: Lines) -> Iterator[str]:
    """How the phase ended, and what of it was skipped or failed."""
    for line in lines:
        if line.get("phase") != phase or line["kind"] not in ("phase", "part") or line["state"] == "begun":
            continue
        what = ", ".join(str(value) for value in line.get("settings", {}).values()) or phase
        after = f" after {line['seconds']} s" if "seconds" in line else ""
        reason = f": {line['reason']}" if line.get("reason") else ""
        yield f"- {what} {line['state']}{after}{reason}"


def _tables(figures: Lines) -> list[str]:
    tables: dict[str | None, _Table] = {}
    for figure in figures:
        across = next((name for name in _COLUMNS if name in figure["settings"]), None)
        tables.setdefault(across, _Table(across)).add(figure)
    return ["\n".join(table.markdown()) for table in tables.values()]


def _shares(figures: Lines) -> list[dict[str, Any]]:
    """What each timed UNet row is of the card's best product of matrices in the same precision, where the operations of a row and
    the product have been measured."""
    flops = next((each["value"] for each in figures if each["unit"] == "TFLOP/row"), None)
    best: dict[str, float] = {}
    for each in figures:
        if each["phase"] == "ceilings" and each["figure"] == _CEILING:
            precision = each["settings"]["precision"]
            best[precision] = max(each["value"], best.get(precision, 0.0))
    return [
        {
            **each,
            "figure": "share of the ceiling",
            "value": 100 * flops / (each["value"] / 1000) / best[each["settings"]["precision"]],
            "unit": "%",
        }
        for each in figures
        if flops and each["figure"] == "call" and each["unit"] == "ms/row" and each["settings"]["precision"] in best
    ]


def _number(value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
