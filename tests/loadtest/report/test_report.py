from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffuserve_loadtest.report.report import Plot, Report, Table, publish


def test_a_report_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    report = Report(
        "try",
        {"steps": 3},
        {"ratio": 1.5},
        [Table("A title", ("name", "s"), [("one", "1.25"), ("another", "2")])],
        ["A remark"],
        {"lines": Plot({"one": [(0.5, 1.0), (0.9, 4.0)]}, "load", "slowdown", log_y=True)},
    )
    publish(report, tmp_path / "results")
    printed = capsys.readouterr().out
    assert "A title\nname     s\none      1.25\nanother  2\n\nA remark\n" in printed
    written = json.loads((tmp_path / "results" / "try.json").read_text())
    assert written["settings"] == {"steps": 3}
    assert written["ratio"] == 1.5
    assert {"processor", "cores", "numpy"} <= set(written["machine"])
    assert (tmp_path / "results" / "try-lines.png").read_bytes().startswith(b"\x89PNG")
