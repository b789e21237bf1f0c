"""The generator as a program, against the stub."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import psutil
import pytest

from diffuserve_loadtest.sending import generator
from diffuserve_loadtest.sending.generator import CANNOT_KEEP_UP, GeneratorFailed, generate, generating
from diffuserve_loadtest.sending.lateness import shortfall
from diffuserve_loadtest.sending.records import CANCELLED, OK, Record, Recording, RequestsFailed, read_recording
from diffuserve_loadtest.sending.target import Protocol, Target
from diffuserve_loadtest.server.stub import noise_png, stub
from diffuserve_loadtest.workload.arrivals import Arrivals, Bursts, Closed, Constant, Replay
from diffuserve_loadtest.workload.due_times import due_times
from diffuserve_loadtest.workload.files import to_yaml
from diffuserve_loadtest.workload.plan import plan
from diffuserve_loadtest.workload.workload import Requests, Workload
from tests.client.fake_triton import FakeTriton
from tests.loadtest.held_server import HeldServer
from tests.loadtest.sending.test_http_transport import server
from tests.ports import reserved_port
from tests.waiting import LONG_S, wait_until

LOCUSTFILE = Path(__file__).parents[3] / "loadtest" / "locustfile.py"


def workload(arrivals: Arrivals, **fields: object) -> Workload:
    fields = {"duration_s": 1.0, "warm_up_s": 0.0, "patience_s": LONG_S, **fields}
    return msgspec.convert({"description": "A test.", "arrivals": msgspec.to_builtins(arrivals), **fields}, Workload)


def outcomes(recording: Recording) -> Counter[str]:
    return Counter(record.outcome for record in recording.records)


def test_requests_ask_for_the_targets_model() -> None:
    with FakeTriton() as triton:  # which has stable_diffusion
        load = workload(Constant(rate_per_s=5))
        recording, _ = generate(load, Target("triton-grpc", triton.address, model="photos"))
    assert outcomes(recording) == {"server_unavailable": 5}
    assert "does not serve the model 'photos'. It serves: stable_diffusion." in recording.records[0].message


@pytest.mark.parametrize("protocol", ["triton-grpc", "triton-http"])
def test_an_open_loop_sends_each_request_when_it_is_due(protocol: Protocol) -> None:
    load = workload(Constant(rate_per_s=20))
    with stub() as (grpc, http):
        recording, _ = generate(load, Target(protocol, grpc if protocol == "triton-grpc" else http))
    assert outcomes(recording) == {OK: 20}
    records = sorted(recording.records, key=lambda record: record.due_s)
    assert [record.due_s for record in records] == pytest.approx([number / 20 for number in range(20)])
    assert all(record.due_s <= record.sent_s <= record.done_s for record in records)
    assert all(record.images == 1 and record.size_bytes > 40_000 for record in records)
    assert recording.workload == load


def test_latency_counts_from_the_due_time_and_an_answer_is_not_waited_for() -> None:
    with HeldServer(lambda server, number: server.came == 20) as server:
        recording, _ = generate(workload(Constant(rate_per_s=20)), Target("triton-grpc", server.address))
    assert outcomes(recording) == {OK: 20}
    last_s = max(record.due_s for record in recording.records)
    assert last_s == pytest.approx(0.95)
    assert all(record.latency_s >= last_s - record.due_s for record in recording.records)


def test_an_answer_waits_for_no_other() -> None:
    with HeldServer(lambda server, number: number >= 30 or server.answered >= 10) as server:
        load = workload(Bursts(rate_per_s=40, size=40))
        recording, _ = generate(load, Target("triton-grpc", server.address))
    assert outcomes(recording) == {OK: 40}


def test_a_closed_loop_has_as_many_in_flight_as_it_has_users(tmp_path: Path) -> None:
    with HeldServer(lambda server, number: server.came >= 3) as server:
        recording = run_until(lambda: server.came >= 12, workload(Closed(3), duration_s=3600), server, tmp_path)
    assert outcomes(recording).keys() == {OK}
    assert len(recording.records) >= 9
    assert server.most_at_once == 3


def test_a_closed_loop_ends_when_all_has_been_sent() -> None:
    load = workload(Closed(3, requests=10), duration_s=3600)
    with stub() as (grpc, _):
        recording, _ = generate(load, Target("triton-grpc", grpc))
    assert outcomes(recording) == {OK: 10}
    assert recording.workload.duration_s < 3600


def test_several_processes_share_the_users_of_a_closed_loop() -> None:
    load = workload(Closed(4, requests=8), duration_s=3600)
    # Four have to be there for any of them to be answered.
    with HeldServer(lambda server, number: number < server.came - server.came % 4) as server:
        recording, _ = generate(load, Target("triton-grpc", server.address), workers=2)
    assert outcomes(recording) == {OK: 8}


def test_users_begin_one_after_another() -> None:
    load = workload(Closed(4, requests=4, ramp_s=2), duration_s=3600)
    with HeldServer(lambda server, number: server.came == 4) as server:  # so each user sends one
        recording, _ = generate(load, Target("triton-grpc", server.address))
    assert outcomes(recording) == {OK: 4}
    assert max(record.sent_s for record in recording.records) > 0.5


def test_what_is_sent_beside_a_block_ends_with_it() -> None:
    load = workload(Closed(2), duration_s=3600)
    with server(200, "image/png", noise_png()) as (url, came):
        with generating(load, Target("image-http", url)):
            wait_until(lambda: len(came) > 4)
        assert not _locusts()


def locustfile(folder: Path, monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    """Has the generator's processes run this before all else."""
    path = folder / "locustfile.py"
    path.write_text(f"import sys\n{first}\n{LOCUSTFILE.read_text()}")
    monkeypatch.setattr(generator, "_LOCUSTFILE", path)


def test_what_says_much_is_not_held_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locustfile(tmp_path, monkeypatch, first="print('a warning\\n' * 100_000, file=sys.stderr, flush=True)")
    with (
        server(200, "image/png", noise_png()) as (url, came),
        generating(workload(Closed(2), duration_s=3600), Target("image-http", url)),
    ):
        wait_until(lambda: len(came) > 4)


def test_why_a_worker_failed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "_WORKERS_START_WITHIN_S", 1)
    failing = f"""
import os, pathlib, time
said = pathlib.Path({str(tmp_path)!r}, "said")
if "--worker" in sys.argv:
    print("no room for a worker", file=sys.stderr, flush=True)
    said.touch()
    os._exit(1)
while not said.exists():
    time.sleep(0.02)
"""
    locustfile(tmp_path, monkeypatch, first=failing)
    with pytest.raises(GeneratorFailed, match="no room for a worker"):
        generate(workload(Constant(rate_per_s=10)), Target("triton-grpc", "localhost:1"), workers=2)


def test_a_block_may_end_before_anything_was_sent() -> None:
    with generating(workload(Closed(1)), Target("triton-grpc", "localhost:1")):
        locust = _the_locust()
    assert not locust.is_running()


def test_a_failure_beside_a_block_is_told() -> None:
    load = workload(Closed(1, requests=1), duration_s=3600)
    with (
        stub("--error", "[queue_full] full") as (grpc, _),
        pytest.raises(
            RequestsFailed, match=r"Of 1 requests 1 failed and 0 were not sent. The first one: queue_full: full"
        ),
        generating(load, Target("triton-grpc", grpc)),
    ):
        locust = _the_locust()
        wait_until(lambda: not locust.is_running() or locust.status() == psutil.STATUS_ZOMBIE)


def _the_locust() -> psutil.Process:
    """Once it runs: a process that has just been started is still called as what started it."""
    wait_until(lambda: len(_locusts()) == 1)
    [locust] = _locusts()
    return locust


def _locusts() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "locust" in " ".join(child.cmdline())]


def test_the_servers_error_is_told_by_its_code() -> None:
    message = "[queue_full retry_after_s=2] 256 requests are waiting"
    with stub("--error", message) as (grpc, _):
        recording, _ = generate(workload(Constant(rate_per_s=10)), Target("triton-grpc", grpc))
    assert outcomes(recording) == {"queue_full": 10}
    assert recording.records[0].message == "256 requests are waiting"


def test_a_server_that_is_not_there() -> None:
    target = Target("triton-grpc", f"127.0.0.1:{reserved_port()}")
    recording, _ = generate(workload(Constant(rate_per_s=5)), target)
    assert outcomes(recording) == {"server_unavailable": 5}


def test_what_is_cancelled_is_neither_answered_nor_an_error() -> None:
    requests = [msgspec.to_builtins(Requests(cancel_share=1, cancel_after_s=(0.1, 0.3)))]
    with stub("--stall", "100") as (grpc, _):
        recording, _ = generate(workload(Constant(rate_per_s=10), requests=requests), Target("triton-grpc", grpc))
    assert outcomes(recording) == {CANCELLED: 10}
    assert all(record.done_s - record.sent_s >= 0.1 for record in recording.records)


def test_what_could_not_be_sent_is_counted_and_fails_the_run() -> None:
    with stub("--stall", "100") as (grpc, _):
        recording, kept_up = generate(
            workload(Bursts(rate_per_s=20, size=20), patience_s=3, max_in_flight=8),
            Target("triton-grpc", grpc),
        )
    assert not kept_up
    # All are due at once; a machine that takes three seconds to count to twenty sends more than eight.
    assert recording.unsent > 0
    assert len(recording.records) >= 8
    assert len(recording.records) + recording.unsent == 20
    assert outcomes(recording).keys() == {"timeout"}


def test_more_than_a_hundredth_of_late_requests_fails_a_run() -> None:
    load = workload(Constant(rate_per_s=1))
    on_time = [Record(float(n), n + 0.01, n + 1.0, "x", OK, 1) for n in range(100)]
    assert shortfall(Recording(0.0, load, on_time)) == ""
    late = [Record(float(n), n + 0.2, n + 1.0, "x", OK, 1) for n in range(2)]
    assert "2 of 102 requests were sent more than 50 ms after they were due" in shortfall(
        Recording(0.0, load, [*on_time, *late])
    )


def test_several_processes_share_one_load() -> None:
    load = workload(Constant(rate_per_s=20), requests=[{"steps": [4, 8, 12]}])
    with stub() as (grpc, _):
        recording, _ = generate(load, Target("triton-grpc", grpc), workers=2)
    records = sorted(recording.records, key=lambda record: record.due_s)
    assert [record.due_s for record in records] == pytest.approx(list(due_times(load)))
    assert [record.kind for record in records] == [plan(load, number).kind for number in range(20)]
    assert outcomes(recording) == {OK: 20}


def test_no_process_is_left_and_a_failure_says_why() -> None:
    load = workload(Constant(load=0.5))
    with pytest.raises(GeneratorFailed, match="--capacity-per-s"):
        generate(load, Target("triton-grpc", "localhost:1"))
    assert not _locusts()


def locust(folder: Path, load: Workload, *options: str) -> list[str]:
    """The command line that runs a load as people do, with its recording in a folder."""
    (folder / "w.yaml").write_text(to_yaml(load))
    ours = ["--workload", str(folder / "w.yaml"), "--recording", str(folder / "r.json")]
    return [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), *ours, *options]


def run_until(true: Callable[[], bool], load: Workload, server: HeldServer, folder: Path) -> Recording:
    """Sends a load until the server has seen enough of it; what was in flight then is hung up on."""
    program = locust(folder, load, "--headless", "--host", server.address)
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: true() or process.poll() is not None)
            process.terminate()
            _, log = process.communicate(timeout=LONG_S)
        finally:
            process.kill()
    assert process.returncode in (0, CANNOT_KEEP_UP), log
    return read_recording(folder / "r.json")


@pytest.mark.parametrize(
    "options", [["-u", "2", "-r", "2"], pytest.param(["--processes", "2"], marks=pytest.mark.slow)]
)
def test_locust_runs_it_as_people_know_it(tmp_path: Path, options: list[str]) -> None:
    with stub() as (grpc, _):
        options = [*options, "--headless", "--csv", str(tmp_path / "out"), "--host", grpc]
        load = workload(Constant(rate_per_s=10))
        done = subprocess.run(locust(tmp_path, load, *options), capture_output=True, text=True, timeout=LONG_S)
    assert done.returncode in (0, CANNOT_KEEP_UP), done.stderr
    recording = read_recording(tmp_path / "r.json")
    assert len(recording.records) == 10
    [header, *lines] = (tmp_path / "out_stats.csv").read_text().splitlines()
    total = dict(zip(header.split(","), lines[-1].split(","), strict=True))
    assert int(total["Request Count"]) == len(recording.records)
    assert total["Failure Count"] == "0"
    assert "triton-grpc" in lines[0]


def test_a_run_that_is_stopped_is_recorded_as_far_as_it_went(tmp_path: Path) -> None:
    """One user never hears anything. When the fourth request comes, the other has heard of two."""
    with HeldServer(lambda server, number: number > 0) as server:
        recording = run_until(lambda: server.came >= 4, workload(Closed(2), duration_s=3600), server, tmp_path)
    assert 0 < recording.workload.duration_s < 3600
    # What it hung up on is neither answered nor an error.
    assert outcomes(recording).keys() == {OK}
    assert len(recording.records) >= 2
    assert all(record.due_s < recording.workload.duration_s for record in recording.records)


def test_a_mistake_is_told_before_the_run(tmp_path: Path) -> None:
    done = subprocess.run(
        locust(tmp_path, workload(Closed(1)), "--headless", "--host", "example.com:8001"),
        capture_output=True,
        text=True,
        timeout=LONG_S,
    )
    assert done.returncode == 1
    assert "'example.com:8001' is not this machine" in done.stderr
    with pytest.raises(GeneratorFailed, match=r"nowhere\.csv cannot be replayed"):
        generate(workload(Replay("/nowhere.csv")), Target("triton-grpc", "localhost:1"))


@pytest.mark.slow
def test_the_web_page_stops_a_run_and_starts_another(tmp_path: Path) -> None:
    port = reserved_port()
    page = f"http://127.0.0.1:{port}"
    load = workload(Constant(rate_per_s=10), duration_s=4, patience_s=3600)
    with HeldServer(lambda server, number: number > 0) as server:  # so the first run would not end
        options = ["--host", server.address, "--web-host", "127.0.0.1", "--web-port", str(port)]
        with subprocess.Popen(locust(tmp_path, load, *options), stderr=subprocess.DEVNULL) as process:
            try:
                _swarm(page)
                wait_until(lambda: server.came >= 5)
                urllib.request.urlopen(f"{page}/stop", data=b"", timeout=LONG_S).close()
                stopped = read_recording(tmp_path / "r.json")
                (tmp_path / "r.json").unlink()
                _swarm(page)
                wait_until((tmp_path / "r.json").exists)
                whole = read_recording(tmp_path / "r.json")
            finally:
                process.terminate()
                process.wait(LONG_S)
    assert outcomes(stopped).keys() <= {OK}
    assert len(stopped.records) < 40
    assert whole.workload == load
    assert outcomes(whole) == {OK: 40}


def _swarm(page: str) -> None:
    request = urllib.request.Request(f"{page}/swarm", data=b"user_count=1&spawn_rate=1", method="POST")

    def started() -> bool:
        try:
            with urllib.request.urlopen(request, timeout=LONG_S) as answer:
                return bool(json.load(answer)["success"])
        except urllib.error.URLError:
            return False

    wait_until(started)


@pytest.mark.slow
def test_a_process_that_is_lost_fails_the_run_and_the_others_records_are_kept() -> None:
    killed = threading.Event()

    def kill_a_worker() -> None:
        wait_until(lambda: server.came >= 10)
        _workers(psutil.Process())[0].kill()
        killed.set()
        server.look_again()

    with (
        HeldServer(lambda server, number: killed.is_set()) as server,
        ThreadPoolExecutor() as pool,
    ):
        killing = pool.submit(kill_a_worker)
        load = workload(Constant(rate_per_s=10), duration_s=4)
        recording, kept_up = generate(load, Target("triton-grpc", server.address), workers=2)
        killing.result()
    assert not kept_up
    assert outcomes(recording) == {OK: 20}


def _workers(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if "--worker" in child.cmdline()]
