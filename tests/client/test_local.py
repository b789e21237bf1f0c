"""`LocalClient` on the bundled model, where it has been exported."""

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

BUNDLE = Path(__file__).parents[2] / "model_store" / "bundles" / "tiny-emoji"
needs_bundle = pytest.mark.skipif(not (BUNDLE / "manifest.json").is_file(), reason="no exported bundle")
SMALL = {"steps": 2, "width": 64, "height": 64}


@pytest.fixture
def client() -> Iterator[LocalClient]:
    with LocalClient(BUNDLE) as local:
        yield local


@needs_bundle
def test_stream(client: LocalClient) -> None:
    *steps, result = client.stream("a cat", seed=7, num_images=2, preview=2, **SMALL)  # type: ignore[arg-type]
    assert isinstance(result, Result)
    assert [step.step for step in steps if isinstance(step, Progress)] == [0, 1, 2]
    assert [len(step.previews) for step in steps if isinstance(step, Progress)] == [0, 0, 2]
    assert result.seeds == [7, 8]
    assert [image.size for image in result.images] == [(64, 64)] * 2
    assert result.images[0].info["parameters"] == result.parameters[0]


@needs_bundle
def test_threads_share_a_client(client: LocalClient) -> None:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda seed: client.generate("a cat", seed=seed, **SMALL), range(4)))  # type: ignore[arg-type]
    assert [result.seeds for result in results] == [[0], [1], [2], [3]]


@needs_bundle
def test_describe(client: LocalClient) -> None:
    description = client.describe()
    assert (description.model, description.fields["width"].default) == ("tiny-emoji", 128)


@needs_bundle
def test_requests_are_checked(client: LocalClient) -> None:
    with pytest.raises(InvalidRequest, match="steps is 0"):
        client.stream("a cat", steps=0)


@needs_bundle
def test_closing_a_stream_leaves_the_client_usable(client: LocalClient) -> None:
    events = client.stream("a cat", steps=150)
    next(events)
    events.close()
    assert client.generate("a cat", seed=1, **SMALL).seeds == [1]  # type: ignore[arg-type]


@needs_bundle
def test_closing_the_client_cancels_requests_of_other_threads() -> None:
    client = LocalClient(BUNDLE)
    started = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.generate, "a cat", steps=150, on_progress=lambda _: started.set())
        assert started.wait(30)
        client.close()
        with pytest.raises(Cancelled):
            running.result(30)
    client.close()
    with pytest.raises(Cancelled, match="is closed"):
        client.generate("a cat")


@needs_bundle
def test_interrupt(tmp_path: Path) -> None:
    code = "from diffuserve_client.generate_command import command; command()"
    prompts = ["a cat", "a dog", "--steps", "1", "--seed", "1", "-n", "1"]
    first = [sys.executable, "-c", code, *prompts, "--local", "--bundle", str(BUNDLE), "--quiet"]
    run = subprocess.run(first, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert sorted(run.stdout.split()) == ["a-cat-1.png", "a-dog-1.png"]
    long = [sys.executable, "-c", code, "a cat", "--steps", "150", "-n", "16", "--local", "--bundle", str(BUNDLE)]
    with subprocess.Popen(long, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(5)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr is not None
        assert process.stderr.read() == "Cancelled.\n"


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"manifest.json"):
        LocalClient(tmp_path)
