"""Two models, each of its own bundle, on one Triton."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import psutil
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from diffuserve.bundle.checksums import describe_file, sha256_of_files
from diffuserve.bundle.manifest import read_manifest, write_manifest
from diffuserve.errors import Cancelled, DeadlineExceeded, Draining, QueueFull, ServerUnavailable
from diffuserve.tensors import STABLE_DIFFUSION, VAE_DECODER
from diffuserve.triton.address import TritonAddress
from diffuserve.triton.launcher import TritonServer
from diffuserve_client import Client, Result
from diffuserve_export.repository.assemble import repository_from_bundle
from tests.metrics import read_metrics
from tests.triton.test_http import post
from tests.triton.test_launcher import read_until_served, serve, still_running
from tests.triton.test_lifecycle import process_of
from tests.waiting import LONG_S, wait_until

NEGATIVE = "negative"
MODELS = (STABLE_DIFFUSION, NEGATIVE)
SMALL: dict[str, Any] = {"width": 64, "height": 64, "format": "raw"}
REQUESTS: Sequence[dict[str, Any]] = [
    {"prompt": "a red heart, flat", "steps": 3, "seed": 1, "guidance_scale": 5.0, "sampler": "euler", **SMALL},
    {"prompt": "a slice of pizza, glossy", "steps": 8, "seed": 2, "guidance_scale": 1.0, "sampler": "ddim", **SMALL},
    {"prompt": "a rocket", "steps": 5, "seed": 3, "num_images": 2, "sampler": "dpmpp_2m", **SMALL},
    {"prompt": "a cat", "steps": 12, "seed": 4, "sampler": "euler_a", **SMALL},
]

# A UNet that waits as long as one file exists, and whose calls take the seconds more that another one says.
SLOW_STAGE = """
import time
from pathlib import Path

from diffuserve.triton.stage import StageModel

HOLD, DELAY = Path({folder!r}) / "hold", Path({folder!r}) / "delay"


class TritonPythonModel(StageModel):
    def initialize(self, args):
        super().initialize(args)
        engine = self._engine

        def slow(inputs):
            while HOLD.exists():
                time.sleep(0.02)
            if DELAY.exists():
                time.sleep(float(DELAY.read_text()))
            return engine(inputs)

        self._engine = slow
"""


def negate(path: Path) -> None:
    """Changes a decoder's graph: what it draws is the negative."""
    model = onnx.load(path)
    graph = model.graph
    [decoded] = {node.input[0] for node in graph.node if node.op_type == "IsInf"}
    [(at, last)] = [(at, node) for at, node in enumerate(graph.node) if decoded in node.output]
    last.output[0] = "positive"
    graph.initializer.append(numpy_helper.from_array(np.array(-1, np.float32), "minus_one"))
    graph.node.insert(at + 1, helper.make_node("Mul", ["positive", "minus_one"], [decoded]))
    onnx.save(model, path)


@pytest.fixture(scope="module")
def two(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the repository of both models, whose UNets can be held and slowed."""
    folder = tmp_path_factory.mktemp("two")
    other = Path(shutil.copytree(bundle, folder / "bundle", ignore=shutil.ignore_patterns("*.onnxruntime")))
    path = other / VAE_DECODER / "model.onnx"
    negate(path)
    manifest = read_manifest(other)
    decoder = msgspec.structs.replace(manifest.components[VAE_DECODER], files=(describe_file(other, path),))
    components = {**manifest.components, VAE_DECODER: decoder}
    files = [*manifest.files, *(file for each in components.values() for file in each.files)]
    write_manifest(
        other, msgspec.structs.replace(manifest, components=components, bundle_sha256=sha256_of_files(files))
    )
    repository_from_bundle(bundle, folder / "repository")
    repository_from_bundle(other, folder / "repository", name=NEGATIVE)
    for unet in ("unet", f"{NEGATIVE}_unet"):
        (folder / "repository" / unet / "1" / "model.py").write_text(SLOW_STAGE.format(folder=str(folder)))
    return folder


@dataclass
class Both:
    """A running server, and a client of each model by its name."""

    server: TritonServer
    clients: dict[str, Client]

    def draw(self, model: str, number: int) -> list[NDArray[np.int64]]:
        return pixels(self.clients[model].generate(**REQUESTS[number]))


def pixels(result: Result) -> list[NDArray[np.int64]]:
    return [np.asarray(image).astype(int) for image in result.images]


@pytest.fixture(scope="module")
def both(two: Path) -> Iterator[Both]:
    with ExitStack() as stack:
        server = stack.enter_context(TritonServer(two / "repository", TritonAddress.on_free_ports()))
        clients = {model: stack.enter_context(Client(server.address.grpc, model=model)) for model in MODELS}
        assert server.models == (NEGATIVE, STABLE_DIFFUSION)
        yield Both(server, clients)


Drawn = dict[tuple[str, int], list[NDArray[np.int64]]]


@pytest.fixture(scope="module")
def alone(both: Both) -> Drawn:
    """What each model draws for each request, one after the other."""
    return {(model, number): both.draw(model, number) for model in MODELS for number in range(len(REQUESTS))}


def assert_same(drawn: list[NDArray[np.int64]], expected: list[NDArray[np.int64]]) -> None:
    assert len(drawn) == len(expected)
    for image, reference in zip(drawn, expected, strict=True):
        assert np.abs(image - reference).max() <= 1  # rounded in other company


def test_each_draws_with_its_own_stages(alone: Drawn) -> None:
    for number in range(len(REQUESTS)):
        assert_same(alone[NEGATIVE, number], [255 - image for image in alone[STABLE_DIFFUSION, number]])


def test_requests_of_both_at_once_give_what_they_give_alone(both: Both, alone: Drawn) -> None:
    jobs = [*alone] * 3
    with ThreadPoolExecutor(len(jobs)) as pool:
        drawn = list(pool.map(lambda job: both.draw(*job), jobs))
    for job, images in zip(jobs, drawn, strict=True):
        assert_same(images, alone[job])


def test_over_http_the_name_is_in_the_path(both: Both) -> None:
    for model in MODELS:
        status, text = post(both.server, "generate", {"prompt": "a cat", "steps": 1, "width": 64, "height": 64}, model)
        assert (status, json.loads(text)["model_name"]) == (200, model)


def test_metrics_are_of_one_model(both: Both, two: Path) -> None:
    def waiting() -> dict[str, float]:
        metrics = read_metrics(both.server.address.metrics)
        return {model: metrics["diffuserve_requests_waiting", model] for model in MODELS}

    hold = two / "hold"
    hold.touch()
    try:
        events = both.clients[NEGATIVE].stream(**REQUESTS[0])
        next(events)
        wait_until(lambda: waiting() == {STABLE_DIFFUSION: 0, NEGATIVE: 1})
    finally:
        hold.unlink()
    assert [*events]
    wait_until(lambda: not any(waiting().values()))


def test_the_models_that_there_are_are_named(both: Both) -> None:
    with Client(both.server.address.grpc, model="photos") as client:
        with pytest.raises(ServerUnavailable) as caught:
            client.generate("a cat")
        assert not client.is_ready()
    assert str(caught.value) == (
        f"The server at {both.server.address.grpc} does not serve the model 'photos'. It serves: negative, stable_diffusion."
    )


def test_a_request_that_the_other_models_load_makes_late_is_refused(two: Path) -> None:
    """On a server of its own, that knows nothing yet of what calls take."""
    steps = 4
    wanted: dict[str, Any] = {"steps": steps, "guidance_scale": 1.0, **SMALL}
    with ExitStack() as stack:
        stack.callback((two / "delay").unlink)
        (two / "delay").write_text("0.5")  # of which a call takes the most, however fast the machine is
        server = stack.enter_context(TritonServer(two / "repository", TritonAddress.on_free_ports()))
        ours, other = (stack.enter_context(Client(server.address.grpc, model=model, retries=0)) for model in MODELS)
        # Each learns what its calls take while the other is idle.
        other.generate("a rocket", **{**wanted, "steps": 2})
        own = ours.generate("a rocket", **wanted)
        calls_s = own.denoise_s * steps / (steps - 1)
        # With the margin of 1.5, enough for its calls alone, and not for them and as many of the other's.
        timeout_s = 1.5 * (own.total_s - calls_s + 1.5 * calls_s)
        # What is accepted may still expire, on a machine that stands still meanwhile.
        with suppress(DeadlineExceeded):
            ours.generate("a rocket", timeout_s=timeout_s, **wanted)  # the other is idle

        load = other.stream("a rocket", **{**wanted, "steps": 150})
        stack.callback(load.close)
        next(load)
        with pytest.raises(QueueFull, match=r"^1 requests are being drawn, 1 of them by other models") as caught:
            ours.generate("a rocket", timeout_s=timeout_s, **wanted)
        assert caught.value.retry_after_s > 0
        # One that has time enough beside the other is not refused.
        with suppress(DeadlineExceeded):
            ours.generate("a rocket", timeout_s=30 * timeout_s, **{**wanted, "steps": 1})


# -- the end -----------------------------------------------------------------------------------------------------------


class Lines:
    """What a process says on its standard error."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.text = ""
        self._process = process
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.text += line

    def join(self) -> str:
        self._thread.join()
        return self.text


def drawn_in_the_end(client: Client, fields: dict[str, Any]) -> Result:
    """Its clients retry refusals. Triton cancels what reaches it in the last milliseconds before its port closes, which no client
    may repeat by itself (docs/faults.md), and whoever sent it does."""
    while True:
        with suppress(Cancelled):
            return client.generate(**fields)


def test_a_restart_under_load_of_both_loses_no_request(two: Path, alone: Drawn) -> None:
    address = TritonAddress.on_free_ports()
    hold = two / "hold"
    running: dict[tuple[str, int], Future[Result]] = {}
    with ExitStack() as stack:
        patient = {model: stack.enter_context(Client(address.grpc, model=model, retries=200)) for model in MODELS}
        hasty = {model: stack.enter_context(Client(address.grpc, model=model, retries=0)) for model in MODELS}
        pool = stack.enter_context(ThreadPoolExecutor(64))
        stack.callback(hold.unlink, missing_ok=True)
        with serve(two / "repository", address) as first:
            said, output = Lines(first), read_until_served(first)
            hold.touch()  # so that what has been accepted is not finished before the test says so
            for job in alone:
                accepted = threading.Event()
                running[job] = pool.submit(
                    hasty[job[0]].generate, **REQUESTS[job[1]], on_progress=lambda _, event=accepted: event.set()
                )
                assert accepted.wait(LONG_S)
            first.send_signal(signal.SIGTERM)
            for model in MODELS:
                wait_until(partial(is_draining, hasty[model]))
            later = {job: pool.submit(drawn_in_the_end, patient[job[0]], REQUESTS[job[1]]) for job in alone}
            hold.unlink()
            for job, future in running.items():
                assert_same(pixels(future.result(LONG_S)), alone[job])
            assert first.wait(LONG_S) == 0
            assert "Stopped." in said.join()
            for model, option in ((STABLE_DIFFUSION, "\n"), (NEGATIVE, " --model negative\n")):
                assert f"{address.http}/v2/models/{model}/generate\n" in output
                assert f'"a slice of pizza, glossy" --url {address.grpc}{option}' in output
        with serve(two / "repository", address) as second:
            said, _ = Lines(second), read_until_served(second)
            for job, future in later.items():
                assert_same(pixels(future.result(LONG_S)), alone[job])
            second.send_signal(signal.SIGTERM)
            assert second.wait(LONG_S) == 0
            said.join()


def is_draining(client: Client) -> bool:
    """Whether a request is refused for that; one that is accepted is taken back."""
    events = client.stream("an apple", steps=1, **SMALL)
    try:
        next(events)
    except Draining:
        return True
    finally:
        events.close()
    return False


def test_without_one_models_process_triton_is_ended_for_both(two: Path) -> None:
    address = TritonAddress.on_free_ports()
    with ExitStack() as stack:
        clients = {
            model: stack.enter_context(Client(address.grpc, model=model, idle_timeout_s=None)) for model in MODELS
        }
        pool = stack.enter_context(ThreadPoolExecutor(8))
        hold = two / "hold"
        stack.callback(hold.unlink, missing_ok=True)
        process = stack.enter_context(serve(two / "repository", address))
        said, _ = Lines(process), read_until_served(process)
        children = psutil.Process(process.pid).children(recursive=True)
        hold.touch()
        accepted = {model: threading.Event() for model in MODELS}
        futures = [
            pool.submit(clients[model].generate, "a rocket", on_progress=lambda _, event=event: event.set(), **SMALL)
            for model, event in accepted.items()
        ]
        for event in accepted.values():
            assert event.wait(LONG_S)
        process_of(NEGATIVE, process.pid).kill()
        for future in futures:
            assert isinstance(future.exception(LONG_S), ServerUnavailable)
        assert process.wait(LONG_S) == 1
        assert "The process of negative has died, so Triton was ended." in said.join()
    assert not still_running(children)
