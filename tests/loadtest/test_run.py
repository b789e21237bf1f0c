"""Real servers under a real load."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest

from diffuserve.triton.launcher import TritonServer
from diffuserve_loadtest.report.found import Found
from diffuserve_loadtest.report.page import html
from diffuserve_loadtest.report.run import read_run
from diffuserve_loadtest.report.slo import slo_from_text
from diffuserve_loadtest.run_workload import run_workload
from diffuserve_loadtest.sending.target import Target
from diffuserve_loadtest.server.under_test import UnderTest
from diffuserve_loadtest.server.watch import Sample, Watch
from diffuserve_loadtest.workload.arrivals import Constant
from diffuserve_loadtest.workload.files import to_yaml
from diffuserve_loadtest.workload.workload import Requests, Workload
from tests.gate import Gate
from tests.waiting import LONG_S

_MARK = "DIFFUSERVE_TEST_FOLDER"
FEW = Workload(
    "A few short requests.",
    Constant(rate_per_s=2.0),
    (Requests(steps=(1, 2, 3), guidance_scale=(1.0, 5.0), num_images=(1, 2)),),
    duration_s=5.0,
    warm_up_s=1.0,
    patience_s=LONG_S,
)


def test_a_run_against_triton(server: TritonServer, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    address = server.address
    look = Watch.look

    def look_and_open(watch: Watch) -> Sample:
        """Lets no request end before a sample has one that runs."""
        sample = look(watch)
        if sample.metrics.get("requests_running", 0) >= 1:
            gate.open()
        elif gate.holds:
            gate.close(after=1)
        return sample

    monkeypatch.setattr(Watch, "look", look_and_open)
    with gate.closed():
        run = run_workload(
            "few",
            FEW,
            UnderTest(Target("triton-grpc", address.grpc), address.metrics, server.pid),
            slo=slo_from_text("p95<1000s,errors<0.1%"),
        )
    assert run.measures.outcomes == {"ok": 8}
    assert run.slo_kept
    assert run.measures.shared_rows is not None
    assert run.measures.shared_rows > 0.9
    assert {"tritonserver", "stable_diffusion", "unet", "vae_decoder"} <= run.measures.memory.keys()
    assert run.measures.memory["unet"].peak_bytes > 50 * 2**20
    before, after = run.measures.open_files["stable_diffusion"]
    assert 0 < after <= before + 5
    assert max(sample.metrics.get("requests_running", 0) for sample in run.samples) >= 1
    assert run.measures.useful_rows == pytest.approx(1.0)  # so the server's count is the workload's
    page = html(run)
    for chart in ("Requests waiting and running", "UNet batch sizes", "Resident memory", "Latency distribution"):
        assert f"<figcaption>{chart}</figcaption>" in page


def _loadtest(folder: Path, workload: Workload, *options: str) -> subprocess.CompletedProcess[str]:
    """As a program, which starts the server itself and leaves no process."""
    (folder / "few.yaml").write_text(to_yaml(workload))
    command = [Path(sys.executable).with_name("diffuserve"), "loadtest", "few.yaml", *options]
    # What a process starts inherits its environment.
    environment = {**os.environ, _MARK: str(folder)}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=540)
    assert [process for process in psutil.process_iter() if _marked(process) == str(folder)] == []
    return ended


def _marked(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(_MARK)
    except (psutil.Error, OSError):
        return None


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("unhurried")
def test_the_highest_rate_of_triton(repository: Path, tmp_path: Path) -> None:
    """Or that there is none, where the machine is too slow for this promise."""
    options = ["--repository", str(repository), "--slo", "p95<4s", "--find-max", "--duration", "12"]
    ended = _loadtest(tmp_path, FEW, *options)
    results = tmp_path / "loadtest-results"
    found = msgspec.json.decode((results / "few-tries.json").read_bytes(), type=Found)
    run = read_run(results / "few.json")
    kept = found.rate_per_s is not None
    assert ended.returncode == (0 if kept else 2), ended.stderr
    assert run.slo_kept == kept == (run.measures.latency_s["p95"] < 4)
    assert run.capacity_per_s is not None
    assert "Latency against offered rate" in (results / "few.html").read_text()
    assert found.words in ended.stdout


@pytest.fixture(scope="module")
def archive(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffuserve_export.repository.archive import archive_from_bundle

    path = tmp_path_factory.mktemp("mar") / "tiny-emoji.mar"
    archive_from_bundle(bundle, path)
    return path


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize("protocol", ["torchserve-grpc", "torchserve-http"])
def test_a_run_against_torchserve(archive: Path, protocol: str, tmp_path: Path) -> None:
    workload = msgspec.structs.replace(FEW, arrivals=Constant(rate_per_s=1.0), duration_s=10.0)
    options = ["--server", "torchserve", "--archive", str(archive), "--protocol", protocol]
    ended = _loadtest(tmp_path, workload, *options)
    assert ended.returncode == 0, ended.stderr
    run = read_run(tmp_path / "loadtest-results" / "few.json")
    assert run.measures.outcomes == {"ok": 9}
    assert "worker" in run.measures.memory
    assert run.measures.useful_rows == pytest.approx(1.0)
