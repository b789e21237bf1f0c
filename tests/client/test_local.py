"""`LocalClient` on the bundled model."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from diffuserve.errors import BundleError, Cancelled, InvalidRequest
from diffuserve_client import LocalClient, Progress, Result
from tests.gate import Gate
from tests.waiting import LONG_S, wait_until

SMALL = {"steps": 2, "width": 64, "height": 64}


@pytest.fixture
def client(bundle: Path) -> Iterator[LocalClient]:
    with LocalClient(bundle) as local:
        yield local


def test_stream(client: LocalClient) -> None:
    *steps, result = client.stream("a cat", seed=7, num_images=2, preview=2, **SMALL)  # type: ignore[arg-type]
    assert isinstance(result, Result)
    assert [step.step for step in steps if isinstance(step, Progress)] == [0, 1, 2]
    assert [len(step.previews) for step in steps if isinstance(step, Progress)] == [0, 0, 2]
    assert result.seeds == [7, 8]
    assert [image.size for image in result.images] == [(64, 64)] * 2
    assert result.images[0].info["parameters"] == result.parameters[0]


def test_threads_share_a_client(client: LocalClient) -> None:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda seed: client.generate("a cat", seed=seed, **SMALL), range(4)))  # type: ignore[arg-type]
    assert [result.seeds for result in results] == [[0], [1], [2], [3]]


def test_describe(client: LocalClient) -> None:
    description = client.describe()
    assert (description.model, description.fields["width"].default) == ("tiny-emoji", 128)


def test_requests_are_checked(client: LocalClient) -> None:
    with pytest.raises(InvalidRequest, match="steps is 0"):
        client.stream("a cat", steps=0)


def test_closing_a_stream_leaves_the_client_usable(client: LocalClient) -> None:
    events = client.stream("a cat", steps=150)
    next(events)
    events.close()
    assert client.generate("a cat", seed=1, **SMALL).seeds == [1]  # type: ignore[arg-type]


def test_closing_the_client_cancels_requests_of_other_threads(bundle: Path) -> None:
    client = LocalClient(bundle)
    started = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.generate, "a cat", steps=150, on_progress=lambda _: started.set())
        assert started.wait(LONG_S)
        client.close()
        with pytest.raises(Cancelled):
            running.result(LONG_S)
    client.close()
    with pytest.raises(Cancelled, match="is closed"):
        client.generate("a cat")


def test_interrupt(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "drawn"
    output.mkdir()
    gate = Gate(tmp_path)
    code = gate.program("from diffuserve_client.generate_command import command; command()")
    prompts = ["a cat", "a dog", "--steps", "1", "--seed", "1", "-n", "1"]
    first = [sys.executable, "-c", code, *prompts, "--local", "--bundle", str(bundle), "--quiet"]
    run = subprocess.run(first, cwd=output, capture_output=True, text=True, check=True)
    assert sorted(run.stdout.split()) == ["a-cat-1.png", "a-dog-1.png"]
    long = [sys.executable, "-c", code, "a cat", "--steps", "150", "-n", "16", "--local", "--bundle", str(bundle)]
    with (
        gate.closed(after=2),
        subprocess.Popen(long, cwd=output, stderr=subprocess.PIPE, text=True) as process,
    ):
        wait_until(lambda: gate.holds)
        os.kill(process.pid, signal.SIGINT)
        gate.close(after=9)  # for the call in flight, which is waited for, and far too few for the request
        assert process.wait(LONG_S) == 130
        assert process.stderr is not None
        assert process.stderr.read() == "Cancelled.\n"


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"manifest.json"):
        LocalClient(tmp_path)
