from __future__ import annotations

from pathlib import Path

import click
import msgspec
import pytest

from diffuserve_loadtest.report.compare import comparison_of, differences, read_for_comparison
from diffuserve_loadtest.report.report import publish
from diffuserve_loadtest.report.run import Run, write_run
from tests.loadtest.synthetic import record, run, sample


def _run(latency_s: float, resident_bytes: int = 2**20) -> Run:
    return run([record(float(due_s), latency_s) for due_s in range(10, 60)], [sample(20, resident_bytes)])


def test_two_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    report = comparison_of(_run(2.0), _run(1.0, 3 * 2**20), ("before", "after"))
    rows = {row[0]: row[1:] for row in report.tables[0].rows}
    assert rows["latency p95, s"] == ("2", "1", "0.50")
    assert rows["answered, requests/s"] == ("0.5", "0.5", "1.00")
    assert rows["peak memory, MiB"] == ("1", "3", "3.00")
    assert rows["rows of a UNet call"] == ("", "", "")  # neither server had metrics
    assert not report.remarks
    publish(report, tmp_path)
    assert "before  after  ratio" in capsys.readouterr().out
    assert (tmp_path / "compare-latency.png").read_bytes().startswith(b"\x89PNG")


def test_what_makes_a_comparison_doubtful_is_said() -> None:
    first = _run(2.0)
    workload = msgspec.structs.replace(first.recording.workload, seed=2)
    second = msgspec.structs.replace(
        first,
        machine={**first.machine, "cores": "96"},
        kept_up=False,
        recording=msgspec.structs.replace(first.recording, workload=workload),
    )
    assert differences(first, first) == []
    assert differences(first, second) == [
        f"cores is {first.machine['cores']} in the first run and 96 in the second.",
        "the workloads differ in seed.",
        "the generator of the second run could not keep up.",
    ]
    assert comparison_of(first, second, ("a", "b")).remarks[1] == "Warning: the workloads differ in seed."


def test_a_comparison_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(click.ClickException, match=r"other.json cannot be compared"):
        read_for_comparison(tmp_path / "other.json")
    with pytest.raises(click.ClickException, match=r"none.json cannot be compared"):
        read_for_comparison(tmp_path / "none.json")
    write_run(_run(1.0), tmp_path / "run.json")
    assert read_for_comparison(tmp_path / "run.json").name == "made-up"
