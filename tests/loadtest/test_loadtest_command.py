"""`diffuserve loadtest` as a program, against a stub that answers at once."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import psutil
import pytest

from diffuserve_loadtest.loadtest_command import command
from diffuserve_loadtest.report.run import Run, read_run
from diffuserve_loadtest.report.slo import slo_from_text
from diffuserve_loadtest.server.stub import stub
from diffuserve_loadtest.workload.files import read_workload, shipped_workloads
from tests.waiting import LONG_S

_ROOT = Path(__file__).parents[2]
_WORKLOAD = """\
description: A few requests.
duration_s: 2
warm_up_s: {warm_up_s}
patience_s: {patience_s}
max_in_flight: {max_in_flight}
arrivals: {{process: {process}, rate_per_s: 20}}
"""
_USUAL = {"process": "constant", "warm_up_s": 0.5, "patience_s": LONG_S, "max_in_flight": 100}
pytestmark = pytest.mark.usefixtures("unhurried")


def _loadtest(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    program = [Path(sys.executable).with_name("diffuserve"), "loadtest", *options]
    return subprocess.run(program, cwd=folder, capture_output=True, text=True, timeout=LONG_S)


def _against(address: str, folder: Path, *options: str, **workload: object) -> tuple[int, str, Run]:
    (folder / "few.yaml").write_text(_WORKLOAD.format(**{**_USUAL, **workload}))
    ended = _loadtest(folder, "few.yaml", "--url", address, "--metrics-url", "http://127.0.0.1:1/metrics", *options)
    return ended.returncode, ended.stdout + ended.stderr, read_run(folder / "loadtest-results" / "few.json")


def test_a_promise_that_was_kept(tmp_path: Path) -> None:
    with stub() as (address, _):
        code, printed, run = _against(address, tmp_path, "--slo", "p50<1000s,errors<1%")
    assert code == 0, printed
    assert run.measures.outcomes == {"ok": 30}
    assert run.measures.offered_per_s == pytest.approx(20)
    assert run.kept_up
    assert "p50<1000s" in printed
    page = (tmp_path / "loadtest-results" / "few.html").read_text()
    assert "<figcaption>Latency distribution</figcaption>" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few.yaml", "loadtest-results"]


@pytest.mark.slow
def test_several_processes_share_the_requests(tmp_path: Path) -> None:
    with stub() as (address, _):
        code, printed, run = _against(address, tmp_path, "--workers", "2")
    assert code == 0, printed
    assert run.measures.outcomes == {"ok": 30}


def test_a_promise_that_was_broken(tmp_path: Path) -> None:
    with stub("--error", "[queue_full retry_after_s=1] 3 requests are waiting") as (address, _):
        code, printed, run = _against(address, tmp_path, "--slo", "errors<1%")
    assert code == 2, printed
    assert run.measures.refused == 1.0
    assert run.measures.refusal_s is not None
    assert "errors<1%                          100.00%: BROKEN" in printed
    assert "3 requests are waiting" in printed


def test_a_generator_that_could_not_keep_up(tmp_path: Path) -> None:
    with stub("--stall", "100") as (address, _):
        options = ["--slo", "errors<1%"]
        # All at once, and those that are sent keep the others out for as long as anybody is patient.
        load = {"process": "bursts, size: 40", "warm_up_s": 0, "patience_s": 3, "max_in_flight": 2}
        code, printed, run = _against(address, tmp_path, *options, **load)
    assert code == 3, printed
    assert not run.kept_up
    assert run.measures.unsent > 0
    assert "could not keep up" in printed


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_generator_too(how: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "few.yaml").write_text(_WORKLOAD.format(**_USUAL))
    program = [Path(sys.executable).with_name("diffuserve"), "loadtest", "few.yaml", "--duration", "60"]
    with (
        stub() as (address, _),
        subprocess.Popen([*program, "--url", address], cwd=tmp_path, stderr=subprocess.PIPE) as process,
    ):
        try:
            generators: list[psutil.Process] = []
            while not generators:
                assert process.poll() is None
                generators = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(how)
            assert process.wait(LONG_S) == 1
        finally:
            process.kill()
    assert not psutil.wait_procs(generators, timeout=LONG_S)[1]
    assert [path.name for path in tmp_path.iterdir()] == ["few.yaml"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nonsense"], "There is no workload 'nonsense'"),
        (["single", "--slo", "p95"], "is not a term of an SLO"),
        (["single", "--find-max"], "--find-max needs an SLO to keep"),
        (["single", "--rate", "0"], "--rate"),
        (["single", "--no-such-option"], "No such option"),
        (["single", "--url", "example.org:8001"], "is not this machine"),
        (["single", "--protocol", "torchserve-grpc"], "is not a protocol of --server triton"),
        (["single", "--repository", "nowhere"], "nowhere"),
        (["single", "--server", "torchserve", "--model", "photos"], "An archive's model is called stable_diffusion"),
        (["compare", "one.json", "two.json"], "one.json cannot be compared"),
    ],
)
def test_what_cannot_be_run_ends_with_1(options: Sequence[str], message: str, tmp_path: Path) -> None:
    ended = _loadtest(tmp_path, *options)
    assert ended.returncode == 1, ended.stderr
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_help_loads_nothing_heavy(tmp_path: Path) -> None:
    heavy = ("locust", "gevent", "matplotlib", "numpy", "jinja2", "psutil", "grpc")
    code = (
        "import json, sys; from diffuserve.cli import root; root.main(sys.argv[1:], standalone_mode=False);"
        f"print(json.dumps([name for name in {heavy!r} if name in sys.modules]))"
    )
    for options in (["--help"], ["run", "--help"], ["compare", "--help"]):
        ended = subprocess.run(
            [sys.executable, "-c", code, "loadtest", *options],
            capture_output=True,
            text=True,
            timeout=LONG_S,
            check=True,
        )
        assert json.loads(ended.stdout.splitlines()[-1]) == []


_DOCUMENTED = [
    line.partition("#")[0]
    for page in ("README.md", "docs/loadtest.md")
    for line in re.findall(r"^    diffuserve loadtest (.*)$", (_ROOT / page).read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("line", _DOCUMENTED)
def test_what_the_documentation_calls_can_be_called(line: str) -> None:
    name, found, rest = command.resolve_command(click.Context(command), shlex.split(line))
    assert name is not None
    assert found is not None
    values = found.make_context(name, rest).params
    if "workload" in values:
        read_workload(values["workload"])
        slo_from_text(values["slo_text"])


def test_the_example_of_the_documentation_is_a_workload(tmp_path: Path) -> None:
    [example] = re.findall(r"```yaml\n(.*?)```", (_ROOT / "docs" / "loadtest.md").read_text(), re.DOTALL)
    (tmp_path / "example.yaml").write_text(example)
    assert len(read_workload(str(tmp_path / "example.yaml")).requests) == 2


def test_the_documentation_lists_the_workloads() -> None:
    section = (_ROOT / "docs" / "loadtest.md").read_text().partition("## Workloads")[2].partition("```")[0]
    assert sorted(re.findall(r"^\| `([a-z-]+)` \|", section, re.MULTILINE)) == shipped_workloads()
