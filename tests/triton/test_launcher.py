"""`diffuserve serve` as an operator uses it: real processes, signals, and what is left behind."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from diffuserve.errors import DeadlineExceeded, Draining, LaunchError, QueueFull, ServerUnavailable
from diffuserve.triton.address import TritonAddress
from diffuserve.triton.launcher import TritonServer
from diffuserve_client import Client
from tests.gate import Gate
from tests.metrics import waiting_and_running
from tests.waiting import LONG_S, wait_for, wait_until

DIFFUSERVE = Path(sys.executable).with_name("diffuserve")


@contextmanager
def serve(repository: Path, address: TritonAddress, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [str(DIFFUSERVE), "serve", "--repository", str(repository), "--http-port", str(address.http_port)]
    command += ["--grpc-port", str(address.grpc_port), "--metrics-port", str(address.metrics_port), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_until_served(process: subprocess.Popen[str]) -> str:
    """What `diffuserve serve` prints when its server is ready and signals are for it to drain: a client may find the server
    before."""
    assert process.stdout is not None
    lines = []
    while not lines or not lines[-1].startswith("Stop:"):
        lines.append(process.stdout.readline())
        assert lines[-1], "it has ended"
    return "".join(lines)


def still_running(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that are more than an entry in the process table, which lasts until somebody's init has seen it."""
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def shared_memory_of(launcher_pid: int) -> list[Path]:
    return list(Path("/dev/shm").glob(f"diffuserve_{launcher_pid}_*"))  # noqa: S108


def run_folders_of(launcher_pid: int) -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob(f"diffuserve_{launcher_pid}_*"))


def drain(process: subprocess.Popen[str], client: Client) -> None:
    """Sends SIGTERM and returns once the server, which is at work, refuses requests."""
    process.send_signal(signal.SIGTERM)

    def refuses() -> bool:
        try:
            client.generate("an apple", steps=1, timeout_s=1)
        except Draining:
            return True
        except (DeadlineExceeded, QueueFull):  # it came before the signal was heard
            pass
        return False

    wait_until(refuses)


def test_sigterm_finishes_running_requests_refuses_new_ones_and_leaves_nothing(guarded: tuple[Path, Gate]) -> None:
    repository, gate = guarded
    address = TritonAddress.on_free_ports()
    with (
        serve(repository, address) as process,
        ThreadPoolExecutor(4) as pool,
        Client(address.grpc, retries=0) as client,
    ):
        said = read_until_served(process)
        children = psutil.Process(process.pid).children(recursive=True)
        with gate.closed():
            running = [pool.submit(client.generate, "a rocket", steps=steps, seed=steps) for steps in (30, 60, 90)]
            wait_for([3, 0], lambda: waiting_and_running(address))
            wait_until(lambda: gate.holds)
            gate.close(after=2)  # the one that came first, and one for all
            wait_for([0, 3], lambda: waiting_and_running(address))
            drain(process, client)
            assert not any(future.done() for future in running)
        assert all(future.result().images[0].size == (128, 128) for future in running)
        _, errors = process.communicate(timeout=LONG_S)
    assert process.returncode == 0
    assert "Serving tiny-emoji" in said
    assert "max_steps 150" in said
    assert "Stopped." in errors
    assert not still_running(children)
    assert not shared_memory_of(process.pid)


def test_a_launcher_killed_at_once_takes_triton_with_it_and_the_next_one_cleans_up(repository: Path) -> None:
    address = TritonAddress.on_free_ports()
    with serve(repository, address) as process:
        read_until_served(process)
        children = psutil.Process(process.pid).children(recursive=True)
        assert shared_memory_of(process.pid)
        with Client(address.grpc) as client:
            drawing = client.stream("a rocket", steps=150, num_images=16)
            next(drawing)
            process.kill()
            process.wait()
            with pytest.raises(ServerUnavailable):  # nobody could drain it, so Triton does not wait for it
                list(drawing)
        psutil.wait_procs(children, timeout=LONG_S)
        assert not still_running(children)
    with TritonServer(repository, TritonAddress.on_free_ports()):
        assert not shared_memory_of(process.pid)
        assert not run_folders_of(process.pid)


def test_a_port_in_use_is_named(repository: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        free = TritonAddress.on_free_ports()
        address = TritonAddress(http_port=free.http_port, grpc_port=port, metrics_port=free.metrics_port)
        with serve(repository, address) as process:
            _, errors = process.communicate(timeout=LONG_S)
    assert process.returncode == 1
    assert f"Port {port} on 127.0.0.1 cannot be used" in errors
    assert "--grpc-port" in errors


def test_an_engine_that_changed_since_assembly_is_not_served(repository: Path, tmp_path: Path) -> None:
    spoiled = tmp_path / "repository"
    shutil.copytree(repository, spoiled)
    (spoiled / "unet" / "1" / "model.onnx").write_bytes(b"not a model")
    with (
        pytest.raises(Exception, match="has changed since it was assembled"),
        TritonServer(spoiled, TritonAddress.on_free_ports()),
    ):
        pass


def test_an_engine_that_cannot_run_keeps_the_server_from_being_ready(repository: Path, tmp_path: Path) -> None:
    """The launcher's own check is passed, so it is the model's warm-up call that fails."""
    from diffuserve.bundle.file_samples import sample_file
    from diffuserve.triton.placement import read_placement, write_placement

    spoiled = tmp_path / "repository"
    shutil.copytree(repository, spoiled)
    folder = spoiled / "unet" / "1"
    placement = read_placement(folder)
    (folder / "model.onnx").write_bytes(b"not a model")
    for stored in folder.glob("*.onnxruntime"):  # from which the engine would start
        shutil.rmtree(stored)
    replaced = type(placement)(
        placement.model, placement.bundle_sha256, placement.component, (sample_file(folder, folder / "model.onnx"),)
    )
    write_placement(folder, replaced)
    with (
        pytest.raises(LaunchError, match="ONNX Runtime cannot load"),
        TritonServer(spoiled, TritonAddress.on_free_ports()),
    ):
        pass


def test_a_missing_repository_and_a_missing_triton_are_named(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(LaunchError, match="diffuserve assemble"),
        TritonServer(tmp_path / "none", TritonAddress.on_free_ports()),
    ):
        pass
    monkeypatch.setenv("TRITONSERVER", str(tmp_path / "tritonserver"))
    with (
        pytest.raises(LaunchError, match="not an executable file"),
        TritonServer(repository, TritonAddress.on_free_ports()),
    ):
        pass


def test_a_client_without_a_server_says_so() -> None:
    with (
        socket.socket() as silent,
        pytest.raises(ServerUnavailable, match="diffuserve serve"),
    ):
        silent.bind(("127.0.0.1", 0))  # nobody else listens there either
        with Client(f"127.0.0.1:{silent.getsockname()[1]}") as client:
            client.generate("an apple")


def test_stopping_leaves_no_temporary_folder(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with TritonServer(repository, TritonAddress.on_free_ports()) as server:
        assert list(tmp_path.iterdir())
        assert server.running
    assert not list(tmp_path.iterdir())
