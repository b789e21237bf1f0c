"""What happens when something goes wrong: on a real server, whose models are told to misbehave or whose processes are
killed. Nobody may wait for ever, and the next request must be served."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from diffuserve.errors import (
    DeadlineExceeded,
    DiffuserveError,
    Draining,
    InvalidRequest,
    ServerUnavailable,
    StageFailed,
)
from diffuserve.triton.address import TritonAddress
from diffuserve.triton.launcher import TritonServer
from diffuserve_client import Client, Result
from tests.triton.test_launcher import serve, still_running, wait_until_ready

SMALL = {"width": 64, "height": 64}
# A request that hears nothing for this long has been forgotten.
IDLE_TIMEOUT_S = 25.0

# The model with faults that a request asks for by its id or format, or a test by a file. It notes the requests that got
# their final response.
FAULTY_STABLE_DIFFUSION = """
from pathlib import Path

import triton_python_backend_utils as pb_utils
from PIL import Image

from diffuserve.batching import policies
from diffuserve.triton.stable_diffusion import StableDiffusionModel

FOLDER = Path({folder!r})
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
save = Image.Image.save


def failing_save(image, file, format=None, **options):
    if str(format).lower() == "webp":
        raise OSError("no space left")
    return save(image, file, format, **options)


def failing(policy):
    def key(job, now_s):
        if (FOLDER / "break-loop").exists():
            (FOLDER / "break-loop").unlink()
            raise ZeroDivisionError("the policy is wrong")
        return policy(job, now_s)

    return key


Image.Image.save = failing_save
policies.POLICIES.update({{name: failing(policy) for name, policy in policies.POLICIES.items()}})


class Sender:
    def __init__(self, sender, request_id):
        self.sender, self.request_id = sender, request_id
        self.is_cancelled = sender.is_cancelled

    def send(self, response=None, flags=0):
        if response is not None and self.request_id.startswith("unsendable final" if flags else "unsendable event"):
            raise RuntimeError("the response cannot be sent")
        self.sender.send(*([] if response is None else [response]), flags=flags)
        if flags & FINAL:
            with (FOLDER / "finals").open("a") as file:
                file.write(self.request_id + "\\n")


class Request:
    def __init__(self, request):
        self.request = request

    def __getattr__(self, name):
        return getattr(self.request, name)

    def get_response_sender(self):
        return Sender(self.request.get_response_sender(), self.request.request_id())


class TritonPythonModel(StableDiffusionModel):
    async def execute(self, requests):
        await super().execute([Request(request) for request in requests])
"""

# The stage with an engine that hangs as long as a file exists.
HANGING_STAGE = """
import time
from pathlib import Path

from diffuserve.triton.stage import StageModel

HANG = Path({folder!r}) / "hang"


class TritonPythonModel(StageModel):
    def initialize(self, args):
        super().initialize(args)
        engine = self._engine

        def hanging(inputs):
            while HANG.exists():
                time.sleep(0.02)
            return engine(inputs)

        self._engine = hanging
"""


def set_parameter(repository: Path, model: str, name: str, value: object) -> None:
    """Changes a parameter in a copied config.pbtxt, or adds it."""
    path = repository / model / "config.pbtxt"
    entry = f'parameters {{\n  key: "{name}"\n  value {{\n    string_value: "{value}"\n  }}\n}}\n'
    old = rf'parameters {{\n  key: "{name}"\n  value {{\n    string_value: "[^"]*"\n  }}\n}}\n'
    path.write_text(re.sub(old, "", path.read_text()) + entry)


class Faults:
    """A server on a repository whose models misbehave on demand; `folder` is where they are told to."""

    def __init__(self, server: TritonServer, client: Client, folder: Path) -> None:
        self.server, self.client, self.folder = server, client, folder

    def finals(self, request_id: str) -> int:
        path = self.folder / "finals"
        return path.read_text().splitlines().count(request_id) if path.exists() else 0

    def assert_answered_once(self, request_id: str) -> None:
        wait_until(lambda: self.finals(request_id) > 0)
        time.sleep(0.1)
        assert self.finals(request_id) == 1

    def assert_serves(self) -> None:
        assert self.client.generate("an apple", steps=1, **SMALL).images


def wait_until(true: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end_s
        time.sleep(0.02)


def process_of(model: str, triton_pid: int) -> psutil.Process:
    """The process of one model; there may be dead ones, which Triton does not wait for."""
    [process] = [
        process
        for process in still_running(psutil.Process(triton_pid).children(recursive=True))
        if any(f"/{model}/1/model.py" in argument for argument in process.cmdline())
    ]
    return process


def outcome(future: Future[Result]) -> type[DiffuserveError] | None:
    error = future.exception(timeout=60)
    assert error is None or isinstance(error, DiffuserveError)
    return None if error is None else type(error)


@pytest.fixture(scope="module")
def faults(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    """A server whose stable_diffusion fails on demand."""
    folder = tmp_path_factory.mktemp("faults")
    copy = folder / "repository"
    shutil.copytree(repository, copy)
    (copy / "stable_diffusion" / "1" / "model.py").write_text(FAULTY_STABLE_DIFFUSION.format(folder=str(folder)))
    with (
        TritonServer(copy, TritonAddress.on_free_ports(), log_level="info") as server,
        Client(server.address.grpc, idle_timeout_s=IDLE_TIMEOUT_S) as client,
    ):
        yield Faults(server, client, folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def hanging(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    """A server whose UNet hangs on demand, and counts as hung after two seconds, for its own process after six."""
    folder = tmp_path_factory.mktemp("hanging")
    copy = folder / "repository"
    shutil.copytree(repository, copy)
    (copy / "unet" / "1" / "model.py").write_text(HANGING_STAGE.format(folder=str(folder)))
    set_parameter(copy, "stable_diffusion", "call_timeout_s", 2.0)
    set_parameter(copy, "unet", "call_timeout_s", 6.0)
    with (
        TritonServer(copy, TritonAddress.on_free_ports()) as server,
        Client(server.address.grpc, idle_timeout_s=IDLE_TIMEOUT_S) as client,
    ):
        yield Faults(server, client, folder)
    shutil.rmtree(folder)


# -- one final response ----------------------------------------------------------------------------------------------


def test_a_finished_request_is_answered_once(faults: Faults) -> None:
    faults.client.generate("a rocket", request_id="finished", steps=2, **SMALL)
    faults.assert_answered_once("finished")


@pytest.mark.parametrize(
    ("request_id", "fields", "error", "words"),
    [
        ("invalid", {"steps": 100_000}, InvalidRequest, "steps"),
        ("late", {"steps": 150, "num_images": 8, "timeout_s": 0.3}, DeadlineExceeded, "300"),
        ("file not encoded", {"steps": 1, "format": "webp"}, StageFailed, "no space left"),
        ("unsendable event", {"steps": 3}, StageFailed, "the response cannot be sent"),
        ("unsendable final", {"steps": 1}, ServerUnavailable, "without an answer"),
    ],
)
def test_a_failed_request_is_answered_once(
    faults: Faults, request_id: str, fields: dict[str, int], error: type[DiffuserveError], words: str
) -> None:
    with pytest.raises(error, match=words):
        faults.client.generate("a rocket", request_id=request_id, **fields)
    faults.assert_answered_once(request_id)
    faults.assert_serves()


def test_a_loop_that_dies_answers_everyone_and_is_started_again(faults: Faults) -> None:
    with ThreadPoolExecutor(3) as pool:
        ids = [f"in the loop {index}" for index in range(3)]
        futures = [pool.submit(faults.client.generate, "a rocket", request_id=id, steps=100, **SMALL) for id in ids]
        time.sleep(0.5)
        (faults.folder / "break-loop").touch()
        assert {outcome(future) for future in futures} == {StageFailed}
    for id in ids:
        faults.assert_answered_once(id)
    faults.assert_serves()


def test_a_request_cancelled_by_its_client_is_answered_once(faults: Faults) -> None:
    events = faults.client.stream("a rocket", request_id="cancelled", steps=150, num_images=4)
    next(events)
    next(events)
    events.close()
    faults.assert_answered_once("cancelled")
    faults.assert_serves()


def test_a_request_whose_client_was_killed_is_answered_once(faults: Faults) -> None:
    program = (
        "from diffuserve_client import Client\n"
        f"for event in Client({faults.server.address.grpc!r}).stream('a rocket', request_id='gone', steps=150, "
        "num_images=4): print(event.step, flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
    faults.assert_answered_once("gone")
    faults.assert_serves()


def test_the_log_names_requests_and_keeps_prompts_to_itself(faults: Faults, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "a xyzzy"
    assert faults.client.generate(prompt, request_id="id-of-done", steps=1, **SMALL).request_id == "id-of-done"
    with pytest.raises(StageFailed):
        faults.client.generate(prompt, negative_prompt=prompt, request_id="id-of-failed", steps=1, format="webp")
    with pytest.raises(InvalidRequest):
        faults.client.generate(prompt * 5000, request_id="id-of-refused")
    log = ""

    def logged() -> bool:
        nonlocal log
        log += capsys.readouterr().err
        return all(id in log for id in ("id-of-done done", "id-of-failed", "id-of-refused"))

    wait_until(logged)
    assert "xyzzy" not in log


# -- a stage's process dies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["unet", "text_encoder", "vae_decoder"])
def test_a_killed_stage_is_loaded_again_and_costs_no_request(faults: Faults, stage: str) -> None:
    before = faults.client.generate("a red heart", seed=1, steps=3, format="raw", **SMALL)
    with ThreadPoolExecutor(4) as pool:
        fields = {"steps": 20, "num_images": 2, **SMALL}
        running = [pool.submit(faults.client.generate, f"a rocket {n}", **fields) for n in range(3)]
        time.sleep(0.5)
        killed = process_of(stage, faults.server.pid)
        killed.kill()
        late = pool.submit(faults.client.generate, f"an apple after {stage}", steps=3, **SMALL)
        assert [outcome(future) for future in [*running, late]] == [None] * 4
    assert process_of(stage, faults.server.pid).pid != killed.pid
    after = faults.client.generate("a red heart", seed=1, steps=3, format="raw", **SMALL)
    assert after.encoded == before.encoded


def test_a_stage_that_cannot_be_loaded_again_fails_its_requests_until_it_can(faults: Faults) -> None:
    engine = faults.folder / "repository" / "unet" / "1" / "model.onnx"
    aside = faults.folder / "model.onnx"
    process_of("unet", faults.server.pid).kill()
    engine.rename(aside)
    for _ in range(2):
        with pytest.raises(StageFailed, match="could not be loaded again"):
            faults.client.generate("a rocket", steps=2, **SMALL)
    aside.rename(engine)
    faults.assert_serves()


# -- a stage hangs -----------------------------------------------------------------------------------------------------


def test_a_call_that_hangs_fails_its_requests_and_its_late_result_does_nothing(hanging: Faults) -> None:
    hang = hanging.folder / "hang"
    before = hanging.client.generate("a red heart", seed=1, steps=3, format="raw", **SMALL)
    unet = process_of("unet", hanging.server.pid)
    hang.touch()
    with pytest.raises(StageFailed, match="no answer in time; a call may take 2 s"):
        hanging.client.generate("a red heart", seed=1, steps=3, num_images=2, **SMALL)
    hang.unlink()
    after = hanging.client.generate("a red heart", seed=1, steps=3, format="raw", **SMALL)
    assert after.encoded == before.encoded
    assert process_of("unet", hanging.server.pid).pid == unet.pid


def test_a_stage_that_hangs_for_good_is_replaced(hanging: Faults) -> None:
    hang = hanging.folder / "hang"
    unet = process_of("unet", hanging.server.pid)
    hang.touch()
    with pytest.raises(StageFailed, match="no answer in time; a call may take 2 s"):
        hanging.client.generate("a rocket", steps=20, **SMALL)
    wait_until(lambda: not still_running([unet]))
    hang.unlink()

    def served() -> bool:
        try:
            return bool(hanging.client.generate("a rocket", steps=1, **SMALL).images)
        except StageFailed:  # with this short timeout, while the model is being loaded
            return False

    wait_until(served)


# -- the in-flight model's process dies, or is told to end ---------------------------------------------------------------


def test_without_the_in_flight_process_triton_is_ended_and_clients_hear_of_it(repository: Path) -> None:
    address = TritonAddress.on_free_ports()
    with (
        serve(repository, address) as process,
        ThreadPoolExecutor(4) as pool,
        Client(address.grpc, idle_timeout_s=IDLE_TIMEOUT_S) as client,
    ):
        wait_until_ready(address)
        children = psutil.Process(process.pid).children(recursive=True)
        futures = [pool.submit(client.generate, f"a rocket {n}", steps=150) for n in range(4)]
        time.sleep(0.5)
        started_s = time.monotonic()
        process_of("stable_diffusion", process.pid).kill()
        assert {outcome(future) for future in futures} == {ServerUnavailable}
        assert time.monotonic() - started_s < 5
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "The process of stable_diffusion has died" in errors
    assert not still_running(children)


def test_sigterm_loses_no_request_whatever_it_waits_for(repository: Path, tmp_path: Path) -> None:
    copy = tmp_path / "repository"
    shutil.copytree(repository, copy)
    set_parameter(copy, "stable_diffusion", "max_active_images", 3)
    address = TritonAddress.on_free_ports()
    with serve(copy, address) as process, ThreadPoolExecutor(12) as pool, Client(address.grpc, retries=0) as client:
        wait_until_ready(address)
        # Of different length, so that some are decoded or done while others have not got their first step.
        futures = [pool.submit(client.generate, f"a rocket {n}", steps=1 + 3 * n, **SMALL) for n in range(12)]
        wait_until(lambda: any(future.done() for future in futures))
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert not all(future.done() for future in futures)
        with pytest.raises(Draining):
            client.generate("an apple", steps=1)
        assert [outcome(future) for future in futures] == [None] * 12
        process.communicate(timeout=30)
    assert process.returncode == 0
