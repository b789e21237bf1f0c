from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from diffuserve_loadtest.sending.target import Target
from diffuserve_loadtest.server import watch
from diffuserve_loadtest.server.metrics import values_and_buckets
from diffuserve_loadtest.server.under_test import UnderTest
from diffuserve_loadtest.server.watch import Watch, processes_of

METRICS = """\
# HELP diffuserve_unet_rows UNet rows executed.
diffuserve_unet_rows{model="stable_diffusion",version="1"} 120
diffuserve_requests_waiting{model="stable_diffusion",version="1"} 3
diffuserve_unet_rows{model="another",version="1"} 7
nv_inference_count{model="stable_diffusion",version="1"} 9
diffuserve_unet_call_rows_sum{model="stable_diffusion"} 120
diffuserve_unet_call_rows_bucket{model="stable_diffusion",le="2"} 10
diffuserve_unet_call_rows_bucket{model="stable_diffusion",le="+Inf"} 30
"""


class _Metrics(BaseHTTPRequestHandler):
    """Says METRICS, but for `/broken`, which promises more than it sends; `requests_waiting` falls by one each time."""

    waiting = 3

    def do_GET(self) -> None:
        body = METRICS.replace(" 3\n", f" {type(self).waiting}\n").encode()
        type(self).waiting = max(0, type(self).waiting - 1)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + 100 * (self.path == "/broken")))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    _Metrics.waiting = 3
    with ThreadingHTTPServer(("127.0.0.1", 0), _Metrics) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_values_and_buckets_of_our_model_only() -> None:
    values, buckets = values_and_buckets(METRICS)
    assert values == {"unet_rows": 120.0, "requests_waiting": 3.0, "unet_call_rows_sum": 120.0}
    assert buckets == {"unet_call_rows": {"2": 10.0, "+Inf": 30.0}}


def test_a_watch_has_samples_of_before_and_after(address: str) -> None:
    with Watch(f"{address}/metrics", os.getpid()) as watch:
        pass
    before, after = watch.samples[0], watch.samples[-1]
    assert before.metrics["unet_rows"] == 120.0
    assert before.at_s < after.at_s
    assert after.metrics["requests_waiting"] == 2.0
    own = before.processes[psutil.Process().name()]
    assert own.resident_bytes > 10 * 2**20
    assert 0 < own.proportional_bytes <= own.resident_bytes
    assert own.open_files > 2
    assert own.threads >= 1
    assert before.proportional_bytes >= own.proportional_bytes


def test_a_watch_reads_the_metrics_of_one_model(address: str) -> None:
    with Watch(f"{address}/metrics", None, "another") as watch:
        pass
    assert watch.samples[0].metrics == {"unet_rows": 7.0}


@pytest.mark.parametrize("path", ["/broken", None])
def test_a_server_that_fails_while_it_is_watched_has_no_metrics(address: str, path: str | None) -> None:
    with Watch(address + path if path else "http://127.0.0.1:1/metrics", None) as watch:
        pass
    assert [sample.metrics for sample in watch.samples] == [{}, {}]
    assert watch.samples[0].processes == {}


def test_children_are_named_by_what_they_run(tmp_path: Path) -> None:
    program = tmp_path / "unet" / "1" / "model.py"
    program.parent.mkdir(parents=True)
    program.write_text("import sys; print(1, flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        children = processes_of(os.getpid())
        assert children["unet"].resident_bytes > 2**20
        process.communicate()
    assert processes_of(process.pid) == {}


def test_shared_memory_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path("/dev/shm") == watch.SHARED_MEMORY  # noqa: S108 - where Linux has it
    monkeypatch.setattr(watch, "SHARED_MEMORY", tmp_path)  # where nobody else's files come and go
    (tmp_path / "region").write_bytes(b"12345")
    sample = Watch(None, None).look()
    assert sample.shared_memory_files == 1


def test_waiting_until_a_server_is_idle(address: str) -> None:
    UnderTest(Target("triton-grpc", "localhost:1"), f"{address}/metrics").wait_until_idle()
    assert _Metrics.waiting == 0
    for cannot_say in (None, "http://127.0.0.1:1/metrics"):
        UnderTest(Target("triton-grpc", "localhost:1"), cannot_say).wait_until_idle()


@pytest.mark.parametrize("url", ["example.org:8001", "http://10.0.0.1:8000", "8001", "http://localhost.example:80"])
def test_a_load_goes_to_this_machine_only(url: str) -> None:
    from diffuserve.errors import InvalidRequest

    with pytest.raises(InvalidRequest, match="is not this machine"):
        Target("triton-http" if "://" in url else "triton-grpc", url)
