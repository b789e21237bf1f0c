"""Every fault in a small setting, on real servers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from diffuserve.errors import LaunchError
from diffuserve_export.repository.assemble import repository_from_bundle
from diffuserve_faults import faults_command, runner
from diffuserve_faults.case import Trial
from diffuserve_faults.runner import CASES, run_cases

QUICK = ("cut-http", "cut-grpc", "garbage")


def assert_nothing_lost(repository: Path, *names: str, scale: float, model: str = "stable_diffusion") -> None:
    report = run_cases(names, repository, model=model, scale=scale)
    assert report.measured["lost"] == 0
    assert report.measured["left"] == []
    assert report.remarks == []
    for case in report.measured["cases"]:
        assert case["tried"] == case["survived"] > 0
        assert case["answered"] > 0


def test_the_command_line_knows_every_case() -> None:
    assert list(CASES) == list(faults_command.NAMES)


# The UNet with calls that take a while on the fastest machine, so that a request of 150 steps lasts until it is cut.
SLOW_STAGE = """
import time

from diffuserve.triton.stage import StageModel


class TritonPythonModel(StageModel):
    def initialize(self, args):
        super().initialize(args)
        engine = self._engine

        def slow(inputs):
            time.sleep(0.01)
            return engine(inputs)

        self._engine = slow
"""


@pytest.fixture
def slow_repository(repository: Path, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(repository, tmp_path / "repository"))
    (copy / "unet" / "1" / "model.py").write_text(SLOW_STAGE)
    return copy


def test_quick_cases_lose_nothing(slow_repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_WARM_UP_IMAGES", 2)  # memory that has grown is for longer runs to find
    assert_nothing_lost(slow_repository, *QUICK, scale=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in (*QUICK, "overload")])
def test_a_case_loses_nothing(slow_repository: Path, name: str) -> None:
    assert_nothing_lost(slow_repository, name, scale=0.3)


@pytest.mark.slow
def test_overload_loses_nothing(repository: Path) -> None:
    """What it measures is for a quiet machine; that nothing is lost is not."""
    [case] = run_cases(["overload"], repository, scale=0.2).measured["cases"]
    assert case["lost"] == 0
    assert case["errors"]["queue_full"] > 0
    assert case["answered"] > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lost": 1, "losses": ["a wrong image"]}, "garbage: a wrong image"),
        ({"problems": ["requests_running is 1"]}, "garbage: requests_running is 1"),
        ({}, None),
    ],
)
def test_what_is_lost_or_not_as_before_sets_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], words: str | None
) -> None:
    good = {"case": "garbage", "tried": 9, "survived": 9, "lost": 0, "answered": 4, "errors": {"http_400": 5}, "cut": 0}
    result = {**good, "losses": [], "problems": [], **change}
    monkeypatch.setattr(runner, "run_cases", lambda names, repository, model, scale: runner._report([result], [], {}))
    outcome = CliRunner().invoke(faults_command.command, ["--output", str(tmp_path)])
    assert outcome.exit_code == (1 if words else 0)
    assert re.search(r"^garbage +9 +9 ", outcome.output, re.MULTILINE)
    assert words is None or words in outcome.output
    assert json.loads((tmp_path / "faults.json").read_text())["cases"] == [result]


@pytest.mark.slow
def test_cases_on_one_of_two_models_lose_nothing(bundle: Path, tmp_path: Path) -> None:
    for name in ("stable_diffusion", "photos"):
        repository_from_bundle(bundle, tmp_path, name=name)
    names = ("killed-inflight", "killed-stage", "restarted", "cut-clients", "garbage")
    assert_nothing_lost(tmp_path, *names, scale=0.02, model="photos")


def test_a_model_that_is_not_there(repository: Path) -> None:
    with pytest.raises(LaunchError, match=r"does not serve the model 'photos'\. It serves: stable_diffusion\."):
        run_cases(QUICK, repository, model="photos")


def test_what_is_left_in_shared_memory_fails_the_run() -> None:
    assert runner._report([], ["diffuserve_1_x"], {}).measured["passed"] is False


@pytest.mark.slow
def test_a_case_that_fails_and_leaves_no_server_is_a_finding(
    slow_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(trial: Trial) -> None:
        trial.server.stop()
        raise ValueError("broken")

    monkeypatch.setitem(runner.CASES, "garbage", ("nothing", break_off))
    report = run_cases(["garbage", "cut-http"], slow_repository, scale=0.02)
    assert report.remarks == [
        "garbage: the case ended with ValueError('broken')",
        "garbage: the server is not running",
    ]
    assert [case["lost"] for case in report.measured["cases"]] == [0, 0]
