"""What happens when something goes wrong: on a real server, whose models are told to misbehave or whose processes are
killed. Nobody may wait for ever, and the next request must be served."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import psutil
import pytest

from diffuserve.errors import (
    DeadlineExceeded,
    DiffuserveError,
    InvalidRequest,
    ServerUnavailable,
    StageFailed,
)
from diffuserve.triton.address import TritonAddress
from diffuserve.triton.launcher import TritonServer
from diffuserve_client import Client, Result
from tests.gate import Gate
from tests.metrics import waiting_and_running
from tests.triton.test_launcher import drain, read_until_served, serve, still_running
from tests.waiting import LONG_S, wait_for, wait_until

SMALL = {"width": 64, "height": 64}

# The model with faults that a request asks for by its id or format, or a test by a file. It notes the requests for
# which a final response is sent.
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
        if flags & FINAL:  # Triton refuses a second one
            with (FOLDER / "finals").open("a") as file:
                file.write(self.request_id + "\\n")
        self.sender.send(*([] if response is None else [response]), flags=flags)


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

# The two processes with call timeouts of a second for calls that hang, and of an hour for others: the in-flight model's while
# `hang` exists, the stage's while `hang-for-good` does. So no call counts as hung that is only slow.
IMPATIENT_STABLE_DIFFUSION = """
from pathlib import Path

from diffuserve import stages
from diffuserve.triton.stable_diffusion import StableDiffusionModel

HANG = Path({folder!r}) / "hang"


async def impatient(stage, call, timeout_s, checked=stages.checked):
    return await checked(stage, call, 1.0 if stage == "unet" and HANG.exists() else 3600.0)


stages.checked = impatient


class TritonPythonModel(StableDiffusionModel):
    pass
"""
HANGING_STAGE = """
import time
from pathlib import Path

from diffuserve.triton.stage import StageModel

HANG, FOR_GOOD = (Path({folder!r}) / name for name in ("hang", "hang-for-good"))


class TritonPythonModel(StageModel):
    _call_timeout_s = property(lambda model: 1.0 if FOR_GOOD.exists() else 3600.0, lambda model, seconds: None)

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
    """A server on a repository whose models misbehave on demand; `folder` is where they are told to. With a gate before its
    UNet."""

    def __init__(self, server: TritonServer, client: Client, folder: Path) -> None:
        self.server, self.client, self.folder = server, client, folder
        self.gate = Gate(folder)

    def finals(self, request_id: str) -> int:
        path = self.folder / "finals"
        return path.read_text().splitlines().count(request_id) if path.exists() else 0

    def assert_answered_once(self, request_id: str) -> None:
        wait_until(lambda: self.finals(request_id) > 0)
        after = f"after {request_id}"  # by whose answer the loop has come round to all that the first one left to do
        assert self.client.generate("an apple", steps=1, request_id=after, **SMALL).images
        wait_until(lambda: self.finals(after) > 0)
        assert self.finals(request_id) == 1

    def assert_serves(self) -> None:
        assert self.client.generate("an apple", steps=1, **SMALL).images


def process_of(model: str, triton_pid: int) -> psutil.Process:
    """The process of one model; there may be dead ones, which Triton does not wait for."""
    [process] = [
        process
        for process in still_running(psutil.Process(triton_pid).children(recursive=True))
        if any(f"/{model}/1/model.py" in argument for argument in process.cmdline())
    ]
    return process


def wait_until_all_run(faults: Faults, count: int) -> None:
    """Returns once requests of one prompt, for which the gate was closed, have done a step, with a call of theirs at the
    gate."""
    wait_for([count, 0], lambda: waiting_and_running(faults.server.address))
    wait_until(lambda: faults.gate.holds)  # so the prompt is encoded, and all are in the loop
    faults.gate.close(after=2)  # that call, of the first of them, and one for all
    wait_for([0, count], lambda: waiting_and_running(faults.server.address))
    wait_until(lambda: faults.gate.holds)


def outcome(future: Future[Result]) -> type[DiffuserveError] | None:
    error = future.exception(timeout=LONG_S)
    assert error is None or isinstance(error, DiffuserveError)
    return None if error is None else type(error)


@contextmanager
def ended_at_once(server: TritonServer) -> Iterator[TritonServer]:
    """Without the seconds in which Triton waits for the models whose processes were killed."""
    server.__enter__()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def faults(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    """A server whose stable_diffusion fails on demand."""
    folder = tmp_path_factory.mktemp("faults")
    copy = folder / "repository"
    shutil.copytree(repository, copy)
    (copy / "stable_diffusion" / "1" / "model.py").write_text(FAULTY_STABLE_DIFFUSION.format(folder=str(folder)))
    Gate(folder).guard(copy)
    with (
        ended_at_once(TritonServer(copy, TritonAddress.on_free_ports(), log_level="info")) as server,
        Client(server.address.grpc) as client,
    ):
        yield Faults(server, client, folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def hanging(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    """A server whose UNet hangs on demand."""
    folder = tmp_path_factory.mktemp("hanging")
    copy = folder / "repository"
    shutil.copytree(repository, copy)
    for model, code in (("stable_diffusion", IMPATIENT_STABLE_DIFFUSION), ("unet", HANGING_STAGE)):
        (copy / model / "1" / "model.py").write_text(code.format(folder=str(folder)))
    with (
        ended_at_once(TritonServer(copy, TritonAddress.on_free_ports())) as server,
        Client(server.address.grpc) as client,
    ):
        yield Faults(server, client, folder)
    shutil.rmtree(folder)


# -- one final response ----------------------------------------------------------------------------------------------


def test_an_id_forges_no_lines_of_the_log(faults: Faults, capsys: pytest.CaptureFixture[str]) -> None:
    logged: list[str] = []

    def log() -> str:
        logged.append(capsys.readouterr().err)
        return "".join(logged)

    forged = "\nI0101 stable_diffusion: forged"
    long = "x" * 1000
    faults.client.generate("a rocket", request_id=f"done{forged}{long}", steps=1, **SMALL)
    with pytest.raises(InvalidRequest):
        faults.client.generate("a rocket", request_id=f"refused{forged}", steps=0)
    wait_until(lambda: "invalid_request: refused" in log())
    # Triton 2.51 escapes backslashes once more.
    assert re.search(r"stable_diffusion: 'done\\+nI0101 stable_diffusion: forgedx{5}\.\.\.' done: 1 x ", log())
    assert re.search(r"stable_diffusion: 'refused\\+nI0101 stable_diffusion: forged' invalid_request: refused", log())
    assert forged not in log()
    assert long not in log()


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
    with faults.gate.closed() if request_id == "late" else nullcontext(), pytest.raises(error, match=words):
        faults.client.generate("a rocket", request_id=request_id, **fields)
    faults.assert_answered_once(request_id)
    faults.assert_serves()


def test_a_loop_that_dies_answers_everyone_and_is_started_again(faults: Faults) -> None:
    ids = [f"in the loop {index}" for index in range(3)]
    with faults.gate.closed(), ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(faults.client.generate, "a rocket", request_id=id, steps=100, **SMALL) for id in ids]
        wait_until_all_run(faults, 3)
        (faults.folder / "break-loop").touch()
        faults.gate.open()
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
        return all(id in log for id in ("'id-of-done' done", "id-of-failed", "id-of-refused"))

    wait_until(logged)
    assert "xyzzy" not in log


# -- a stage's process dies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["unet", "text_encoder", "vae_decoder"])
def test_a_killed_stage_is_loaded_again_and_costs_no_request(faults: Faults, stage: str) -> None:
    before = faults.client.generate("a red heart", seed=1, steps=3, format="raw", **SMALL)
    with faults.gate.closed(after=3), ThreadPoolExecutor(4) as pool:
        fields = {"steps": 20, "num_images": 2, **SMALL}
        running = [pool.submit(faults.client.generate, f"a rocket {n}", **fields) for n in range(3)]
        wait_until(lambda: sum(waiting_and_running(faults.server.address)) == 3 and faults.gate.holds)
        killed = process_of(stage, faults.server.pid)
        killed.kill()
        late = pool.submit(faults.client.generate, f"an apple after {stage}", steps=3, **SMALL)
        faults.gate.open()
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
    with pytest.raises(StageFailed, match="no answer in time; a call may take 1 s"):
        hanging.client.generate("a red heart", seed=1, steps=3, num_images=2, **SMALL)
    hang.unlink()
    after = hanging.client.generate("a red heart", seed=1, steps=3, format="raw", **SMALL)
    assert after.encoded == before.encoded
    assert process_of("unet", hanging.server.pid).pid == unet.pid


def test_a_stage_that_hangs_for_good_is_replaced(hanging: Faults) -> None:
    files = [hanging.folder / name for name in ("hang", "hang-for-good")]
    unet = process_of("unet", hanging.server.pid)
    for file in files:
        file.touch()
    with pytest.raises(StageFailed, match="no answer in time; a call may take 1 s"):
        hanging.client.generate("a rocket", steps=20, **SMALL)
    wait_until(lambda: not still_running([unet]))
    for file in files:
        file.unlink()
    hanging.assert_serves()


# -- the in-flight model's process dies, or is told to end ---------------------------------------------------------------


def test_without_the_in_flight_process_triton_is_ended_and_clients_hear_of_it(guarded: tuple[Path, Gate]) -> None:
    repository, gate = guarded
    address = TritonAddress.on_free_ports()
    with (
        serve(repository, address) as process,
        gate.closed(after=5),
        ThreadPoolExecutor(4) as pool,
        Client(address.grpc) as client,
    ):
        read_until_served(process)
        children = psutil.Process(process.pid).children(recursive=True)
        futures = [pool.submit(client.generate, f"a rocket {n}", steps=150) for n in range(4)]
        wait_until(lambda: sum(waiting_and_running(address)) == 4 and gate.holds)
        process_of("stable_diffusion", process.pid).kill()
        assert {outcome(future) for future in futures} == {ServerUnavailable}
        _, errors = process.communicate(timeout=LONG_S)
    assert process.returncode == 1
    assert "The process of stable_diffusion has died" in errors
    assert not still_running(children)


def test_sigterm_loses_no_request_whatever_it_waits_for(guarded: tuple[Path, Gate]) -> None:
    repository, gate = guarded
    set_parameter(repository, "stable_diffusion", "max_active_images", 3)
    address = TritonAddress.on_free_ports()
    with (
        serve(repository, address) as process,
        gate.closed(),
        ThreadPoolExecutor(12) as pool,
        Client(address.grpc, retries=0) as client,
    ):
        read_until_served(process)
        # Of different length, so that some are decoded or done while others have not got their first step.
        futures = [pool.submit(client.generate, f"a rocket {n}", steps=1 + 3 * n, **SMALL) for n in range(12)]
        wait_for([12, 0], lambda: waiting_and_running(address))
        while not any(future.done() for future in futures):
            wait_until(lambda: gate.holds or any(future.done() for future in futures))
            gate.close(after=1)
        drain(process, client)
        assert not all(future.done() for future in futures)
        gate.open()
        assert [outcome(future) for future in futures] == [None] * 12
        process.communicate(timeout=LONG_S)
    assert process.returncode == 0
