"""The generator as a program, against the stub."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import msgspec
import psutil
import pytest

from diffuserve_loadtest.bench.generator import stub
from diffuserve_loadtest.generator import CANNOT_KEEP_UP, GeneratorFailed, generate
from diffuserve_loadtest.lateness import shortfall
from diffuserve_loadtest.records import CANCELLED, OK, Record, Recording, read_recording
from diffuserve_loadtest.target import Protocol, Target
from diffuserve_loadtest.workload import Arrivals, Bursts, Closed, Constant, Requests, Workload, to_yaml

LOCUSTFILE = Path(__file__).parents[2] / "loadtest" / "locustfile.py"


def workload(arrivals: Arrivals, **fields: object) -> Workload:
    fields = {"duration_s": 2.0, "warm_up_s": 0.0, "patience_s": 10.0, **fields}
    return msgspec.convert({"description": "A test.", "arrivals": msgspec.to_builtins(arrivals), **fields}, Workload)


def outcomes(recording: Recording) -> Counter[str]:
    return Counter(record.outcome for record in recording.records)


@pytest.mark.parametrize("protocol", ["triton-grpc", "triton-http", "triton-stream"])
def test_an_open_loop_sends_each_request_when_it_is_due(protocol: Protocol) -> None:
    load = workload(Constant(rate_per_s=20))
    with stub() as (grpc, http):
        recording, _ = generate(load, Target(protocol, grpc if protocol == "triton-grpc" else http))
    assert outcomes(recording) == {OK: 40}
    records = sorted(recording.records, key=lambda record: record.due_s)
    assert [record.due_s for record in records] == pytest.approx([number / 20 for number in range(40)])
    assert all(record.due_s <= record.sent_s <= record.done_s for record in records)
    assert all(record.images == 1 and record.size_bytes > 40_000 for record in records)
    assert recording.workload == load


def test_latency_counts_from_the_due_time_and_an_answer_is_not_waited_for() -> None:
    with stub("--delay-s", "0.5") as (grpc, _):
        recording, _ = generate(workload(Constant(rate_per_s=20)), Target("triton-grpc", grpc))
    assert outcomes(recording) == {OK: 40}
    assert min(record.latency_s for record in recording.records) >= 0.5
    # One after the other they would have taken 20 s.
    assert max(record.done_s for record in recording.records) < 10


@pytest.mark.parametrize("protocol", ["triton-grpc", "triton-http"])
def test_an_answer_waits_for_no_other(protocol: Protocol) -> None:
    with stub("--stall", "30") as (grpc, http):
        recording, _ = generate(
            workload(Bursts(rate_per_s=40, size=40), duration_s=1, patience_s=4),
            Target(protocol, grpc if protocol == "triton-grpc" else http),
        )
    assert outcomes(recording) == {"timeout": 30, OK: 10}


def test_a_closed_loop_has_as_many_in_flight_as_it_has_users() -> None:
    with stub("--delay-s", "0.2") as (grpc, _):
        recording, kept_up = generate(workload(Closed(3)), Target("triton-grpc", grpc))
    assert kept_up
    assert outcomes(recording).keys() == {OK}
    assert 3 <= len(recording.records) <= 3 * (2 / 0.2 + 1)
    for record in recording.records:
        at_once = [other for other in recording.records if other.sent_s <= record.sent_s < other.done_s]
        assert len(at_once) <= 3


def test_the_servers_error_is_told_by_its_code() -> None:
    message = "[queue_full retry_after_s=2] 256 requests are waiting"
    for protocol in ("triton-grpc", "triton-http"):
        with stub("--error", message) as (grpc, http):
            target = Target(protocol, grpc if protocol == "triton-grpc" else http)  # type: ignore[arg-type]
            recording, _ = generate(workload(Constant(rate_per_s=10), duration_s=1), target)
        assert outcomes(recording) == {"queue_full": 10}
        assert recording.records[0].message == "256 requests are waiting"


def test_a_server_that_is_not_there_and_one_that_never_answers() -> None:
    with stub() as (_, http):
        pass
    recording, _ = generate(workload(Constant(rate_per_s=5), duration_s=1), Target("triton-http", http))
    assert outcomes(recording) == {"connection": 5}
    with stub("--stall", "100") as (grpc, _):
        recording, _ = generate(
            workload(Constant(rate_per_s=5), duration_s=1, patience_s=1), Target("triton-grpc", grpc)
        )
    assert outcomes(recording) == {"timeout": 5}


def test_what_is_cancelled_is_neither_answered_nor_an_error() -> None:
    requests = [msgspec.to_builtins(Requests(cancel_share=1, cancel_after_s=(0.1, 0.3)))]
    with stub("--stall", "100") as (grpc, _):
        recording, _ = generate(
            workload(Constant(rate_per_s=10), duration_s=1, requests=requests), Target("triton-grpc", grpc)
        )
    assert outcomes(recording) == {CANCELLED: 10}
    assert all(0.1 <= record.done_s - record.sent_s < 5 for record in recording.records)


def test_what_could_not_be_sent_is_counted_and_fails_the_run() -> None:
    with stub("--stall", "100") as (grpc, _):
        recording, kept_up = generate(
            workload(Bursts(rate_per_s=20, size=20), duration_s=1, patience_s=1, max_in_flight=8),
            Target("triton-grpc", grpc),
        )
    assert not kept_up
    assert recording.unsent == 12
    assert outcomes(recording) == {"timeout": 8}


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
        together, _ = generate(load, Target("triton-grpc", grpc), workers=2)
        alone, _ = generate(load, Target("triton-grpc", grpc))

    def sent(recording: Recording) -> list[tuple[float, str]]:
        return sorted((round(record.due_s, 6), record.kind) for record in recording.records)

    assert sent(together) == sent(alone)
    assert outcomes(together) == {OK: 40}


def test_no_process_is_left_and_a_failure_says_why() -> None:
    load = workload(Constant(load=0.5))
    with pytest.raises(GeneratorFailed, match="--capacity-per-s"):
        generate(load, Target("triton-grpc", "localhost:1"))
    assert not [child for child in psutil.Process().children(recursive=True) if "locust" in " ".join(child.cmdline())]


def test_locust_runs_it_as_people_know_it(tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text(to_yaml(workload(Closed(2))))
    with stub() as (grpc, _):
        options = ["--workload", str(tmp_path / "w.yaml"), "--recording", str(tmp_path / "r.json")]
        options += ["--csv", str(tmp_path / "out"), "-u", "2", "-r", "2"]
        done = subprocess.run(
            [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--host", grpc, *options],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode in (0, CANNOT_KEEP_UP), done.stderr
    recording = read_recording(tmp_path / "r.json")
    [header, *lines] = (tmp_path / "out_stats.csv").read_text().splitlines()
    total = dict(zip(header.split(","), lines[-1].split(","), strict=True))
    assert int(total["Request Count"]) == len(recording.records)
    assert total["Failure Count"] == "0"
    assert "triton-grpc" in lines[0]
