"""The runner: whatever becomes of a phase, the others run, and what was measured is written down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from diffuserve_bench.gpu.phases import Phase
from diffuserve_bench.gpu.record import read_lines
from diffuserve_bench.gpu.runner import run
from diffuserve_bench.gpu.settings import Settings
from tests.bench.gpu.injected import phase
from tests.waiting import LONG_S, wait_until

_ROOT = Path(__file__).parents[3]


def run_phases(phases: Sequence[Phase], folder: Path) -> tuple[bool, list[dict[str, Any]]]:
    output = folder / "made" / "figures.jsonl"
    good = run(phases, Settings("cpu", folder), output, 10 * LONG_S)
    return good, read_lines([output])


def ends(lines: Sequence[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """The last state of each phase, and why."""
    last = {line["phase"]: line for line in lines if line["kind"] == "phase"}
    return {name: (line["state"], line.get("reason", "")) for name, line in last.items()}


def figures(lines: Sequence[dict[str, Any]], name: str) -> list[float | None]:
    return [line["value"] for line in lines if line["kind"] == "figure" and line["phase"] == name]


def is_alive(pid: int) -> bool:
    """Whether the process runs: not if it is gone, or dead and not yet waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: Sequence[float | None]) -> None:
    wait_until(lambda: not any(is_alive(int(pid or 0)) for pid in pids))


def test_a_phase_that_ends_badly_does_not_end_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names = ["raising", "crashing", "in_parts", "lacking", "leaving", "unsuitable", "good"]
    ended_well, lines = run_phases([phase(name) for name in names], tmp_path)
    assert not ended_well
    assert ends(lines) == {
        "raising": ("failed", "ValueError: no such luck"),
        "crashing": ("died", "by SIGSEGV"),
        "in_parts": ("ended", ""),
        "lacking": ("skipped", "needs a_package_that_nobody_has, which is not installed"),
        "leaving": ("died", "with exit code 7"),
        "unsuitable": ("skipped", "there is no wind"),
        "good": ("ended", ""),
    }
    assert [figures(lines, name) for name in ("raising", "crashing", "good")] == [[1.0], [3.0], [2.5]]
    [part] = [line for line in lines if line["kind"] == "part"]
    assert (part["state"], part["reason"], part["settings"]) == (
        "failed",
        "ValueError: it broke",
        {"part": "first"},
    )
    assert figures(lines, "in_parts") == [None]  # not a number, which JSON does not have
    # Standard output has the same lines and nothing else.
    captured = capfd.readouterr()
    assert [json.loads(line) for line in captured.out.splitlines()] == lines
    assert "what a library prints" in captured.err


def test_a_phase_that_hangs_is_killed_after_its_time(tmp_path: Path) -> None:
    ended_well, lines = run_phases([phase("hanging", 2), phase("good")], tmp_path)
    assert not ended_well
    assert ends(lines) == {"hanging": ("out of time", "it was killed after 2 s"), "good": ("ended", "")}
    wait_until_gone(figures(lines, "hanging"))


def test_no_phase_begins_when_all_time_has_passed(tmp_path: Path) -> None:
    output, times_s = tmp_path / "figures.jsonl", iter([10.0, 10.0, 11.5])
    phases = [phase("hanging"), phase("good")]
    assert not run(phases, Settings("cpu", tmp_path), output, 2, now_s=lambda: next(times_s))
    assert ends(read_lines([output])) == {
        "hanging": ("out of time", "it was killed after 2 s"),
        "good": ("skipped", "no time is left"),
    }


@contextmanager
def hanging_run(folder: Path) -> Iterator[tuple[subprocess.Popen[str], list[float | None]]]:
    """A run in a process of its own whose phase hangs, and the processes of that phase."""
    code = (
        "import sys; from pathlib import Path; from tests.bench.gpu.test_runner import run_phases, phase;"
        "run_phases([phase('good'), phase('hanging'), phase('good')], Path(sys.argv[1]))"
    )
    program = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(program, cwd=_ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines: list[dict[str, Any]] = []
        try:
            for text in process.stdout:
                lines.append(json.loads(text))
                if len(pids := figures(lines, "hanging")) == 2:
                    break
            yield process, pids
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_loses_nothing_and_leaves_nothing(number: int, tmp_path: Path) -> None:
    with hanging_run(tmp_path) as (process, pids):
        os.kill(process.pid, number)
        process.wait(LONG_S)
        wait_until_gone(pids)
    lines = read_lines([tmp_path / "made" / "figures.jsonl"])
    assert figures(lines, "good") == [2.5]
    assert figures(lines, "hanging") == pids
    state = "begun" if number == signal.SIGKILL else "stopped"
    assert {name: state for name, (state, _) in ends(lines).items()} == {"good": "ended", "hanging": state}


def test_a_reader_that_has_gone_ends_nothing(tmp_path: Path) -> None:
    code = "from pathlib import Path; from tests.bench.gpu.test_runner import *; import sys;"
    program = [sys.executable, "-c", code + "run_phases([phase('good'), phase('raising')], Path(sys.argv[1]))"]
    with subprocess.Popen([*program, str(tmp_path)], cwd=_ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(LONG_S) == 0
    states = {name: state for name, (state, _) in ends(read_lines([tmp_path / "made" / "figures.jsonl"])).items()}
    assert states == {"good": "ended", "raising": "failed"}
