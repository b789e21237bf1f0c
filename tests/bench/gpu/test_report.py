"""Tables made of a run's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from diffuserve_bench.bench_command import command
from diffuserve_bench.gpu.record import read_lines
from diffuserve_bench.gpu.report import markdown


def figure(phase: str, name: str, value: float | None, unit: str, **settings: Any) -> dict[str, Any]:
    return {"kind": "figure", "phase": phase, "figure": name, "value": value, "unit": unit, "settings": settings}


LINES = [
    {"kind": "machine", "card": "Abacus 3000", "driver": "1.2", "torch": "2.11"},
    {"kind": "phase", "phase": "unet", "state": "begun", "deadline_s": 5},
    figure("unet", "load", 1.25, "s", engine="a", precision="fp16"),
    figure("unet", "memory", 12345.6, "MiB", engine="a", precision="fp16"),
    figure("unet", "call", 4.0, "ms/row", rows=8, engine="a", precision="fp16"),
    figure("unet", "call", 5.0, "ms/row", rows=1, engine="a", precision="fp16"),
    figure("unet", "call", None, "ms/row", rows=1, engine="b", precision="fp32"),
    {"kind": "part", "phase": "unet", "state": "skipped", "reason": "no c", "settings": {"engine": "c"}},
    {"kind": "phase", "phase": "unet", "state": "out of time", "seconds": 5.0, "reason": "it was killed after 5 s"},
    figure("model", "UNet", 0.8, "TFLOP/row", size="512x512"),
    figure("ceilings", "matrix product", 600.0, "TFLOP/s", precision="fp16", shape="1x1x1"),
    figure("ceilings", "matrix product", 800.0, "TFLOP/s", precision="fp16", shape="8x8x8"),
]


def write(path: Path, lines: list[dict[str, Any]], end: str = "\n") -> Path:
    path.write_text("\n".join(map(json.dumps, lines)) + end)
    return path


def test_figures_become_tables_by_phase_and_by_what_they_vary_over(tmp_path: Path) -> None:
    text = markdown(LINES)
    assert text.startswith("Abacus 3000; driver 1.2, torch 2.11.\n")
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## ceilings", "## model", "## unet"]
    unet = text[text.index("## unet") :]
    assert "- unet out of time after 5.0 s: it was killed after 5 s" in unet
    assert "- c skipped: no c" in unet
    assert "| load | engine a, precision fp16 | s | 1.25 |" in unet
    assert "| memory | engine a, precision fp16 | MiB | 12,346 |" in unet
    assert "| figure | of | unit | rows 1 | rows 8 |\n|---|---|---|---|---|" in unet
    assert "| call | engine a, precision fp16 | ms/row | 5 | 4 |" in unet
    assert "| call | engine b, precision fp32 | ms/row | not finite |  |" in unet
    # 0.8 TFLOP in 5 and in 4 ms, of 800 TFLOP/s.
    assert "| share of the ceiling | engine a, precision fp16 | % | 20 | 25 |" in unet
    assert "share of the ceiling | engine b" not in unet


def test_several_files_and_one_that_was_cut_short(tmp_path: Path) -> None:
    whole = write(tmp_path / "first.jsonl", LINES[:4])
    cut = write(tmp_path / "second.jsonl", LINES[4:6], end="\n{'kind': 'fig")
    assert read_lines([whole, cut]) == LINES[:6]
    result = CliRunner().invoke(command, ["gpu", "--report", str(whole), str(cut)])
    assert result.exit_code == 0
    assert "| load |" in result.output
    assert "| call | engine a, precision fp16 | ms/row | 5 | 4 |" in result.output
