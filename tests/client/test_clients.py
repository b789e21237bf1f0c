"""`Client` and `AsyncClient` against a server in this process; what both promise is tested on both."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffuserve.errors import Cancelled, DeadlineExceeded, QueueFull, ServerUnavailable, StageFailed
from diffuserve_client import AsyncClient, Client, Description, Progress, Result, watchdog
from tests.client import fake_triton
from tests.client.fake_triton import SIDE_PX, FakeTriton
from tests.clocks import Clock, run_by
from tests.ports import reserved_port
from tests.waiting import LONG_S, wait_until

Generate = Callable[..., Result]


def generate_with_client(
    address: str, prompt: str, *, settings: Any = None, clock: Clock | None = None, **fields: Any
) -> Result:
    with Client(address, **(settings or {})) as client:
        return client.generate(prompt, **fields)


def generate_with_async_client(
    address: str, prompt: str, *, settings: Any = None, clock: Clock | None = None, **fields: Any
) -> Result:
    async def main() -> Result:
        async with AsyncClient(address, **(settings or {})) as client:
            return await client.generate(prompt, **fields)

    return asyncio.run(main()) if clock is None else run_by(clock, main())


both = pytest.mark.parametrize("generate", [generate_with_client, generate_with_async_client])


@both
def test_generate(triton: FakeTriton, generate: Generate) -> None:
    result = generate(triton.address, "a cat", num_images=2, seed=7, request_id="mine")
    assert result.seeds == [7, 8]
    assert (result.width, result.height) == (SIDE_PX, SIDE_PX)
    assert (result.queue_s, result.denoise_s, result.total_s) == (0.25, 0.5, 0.75)
    assert result.parameters == ["a cat\nSeed: 7", "a cat\nSeed: 8"]
    assert [image.getpixel((0, 0)) for image in result.images] == [(7, 7, 7), (8, 8, 8)]
    assert [image.info["parameters"] for image in result.images] == result.parameters
    assert result.request_id == "mine"
    assert triton.request_ids == ["mine"]
    fields = {"prompt": "a cat", "num_images": 2, "seed": 7, "encoding": "binary", "progress": True}
    assert triton.requests == [fields]


def describe_with_client(address: str) -> Description:
    with Client(address) as client:
        return client.describe()


def describe_with_async_client(address: str) -> Description:
    async def main() -> Description:
        async with AsyncClient(address) as client:
            return await client.describe()

    return asyncio.run(main())


@pytest.mark.parametrize("describe", [describe_with_client, describe_with_async_client])
def test_describe(triton: FakeTriton, describe: Callable[[str], Description]) -> None:
    description = describe(triton.address)
    assert triton.requests == [{"describe": True, "encoding": "binary"}]
    assert (description.model, description.server_version, description.wire_version) == ("fake", "0.1.0", 1)
    assert description.fields["prompt"].default is None
    assert (description.fields["steps"].minimum, description.fields["steps"].maximum) == (1, 9)
    assert description.fields["width"].multiple_of == 8
    assert description.fields["sampler"].enum == ("ddim", "euler")
    assert description.limits["max_rows"] == 32


def test_every_request_tells_its_version(triton: FakeTriton) -> None:
    generate_with_client(triton.address, "a cat")
    describe_with_client(triton.address)
    assert triton.wire_versions == [1, 1]


@both
def test_what_the_safety_checker_withheld_is_told(triton: FakeTriton, generate: Generate) -> None:
    assert generate(triton.address, "unsafe", num_images=2).flagged == [True, True]
    assert generate(triton.address, "a cat", num_images=2).flagged == [False, False]


@both
def test_formats(triton: FakeTriton, generate: Generate) -> None:
    for format in ("png", "jpeg", "webp", "raw"):
        result = generate(triton.address, "a cat", format=format)
        assert result.format == format
        assert result.images[0].size == (SIDE_PX, SIDE_PX)


@both
def test_progress(triton: FakeTriton, generate: Generate) -> None:
    seen: list[Progress] = []
    generate(triton.address, "a cat", steps=2, on_progress=seen.append)
    assert seen == [Progress(0, 2), Progress(1, 2), Progress(2, 2)]


@both
def test_progress_is_asked_for_only_where_it_is_used(triton: FakeTriton, generate: Generate) -> None:
    generate(triton.address, "a cat", settings={"idle_timeout_s": None})
    assert "progress" not in triton.requests[0]


@both
def test_on_progress_may_raise(triton: FakeTriton, generate: Generate) -> None:
    def stop(progress: Progress) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError):
        generate(triton.address, "endless", on_progress=stop)
    assert triton.cancelled.wait(LONG_S)


@both
@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("error [deadline_exceeded] too late", DeadlineExceeded, "too late"),
        ("error [queue_full retry_after_s=2.5] full", QueueFull, "full"),
        ("error something broke", StageFailed, "something broke"),
        ("empty", ServerUnavailable, "without an answer"),
        ("foreign", StageFailed, "'other' answered with logits"),
    ],
)
def test_errors(triton: FakeTriton, generate: Generate, prompt: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        generate(triton.address, prompt, settings={"retries": 0})


@both
def test_unknown_model(triton: FakeTriton, generate: Generate) -> None:
    triton.models = ["unet", "vae_decoder", "stable_diffusion", "photos_unet", "photos", "photos_safety_checker"]
    with pytest.raises(ServerUnavailable) as caught:
        generate(triton.address, "a cat", settings={"model": "other"})
    assert str(caught.value) == (
        f"The server at {triton.address} does not serve the model 'other'. It serves: photos, stable_diffusion."
    )


@both
@pytest.mark.parametrize("models", [None, []])
def test_unknown_model_of_a_server_that_does_not_say_which_it_has(
    triton: FakeTriton, generate: Generate, models: list[str] | None
) -> None:
    triton.models = models
    with pytest.raises(
        ServerUnavailable, match=r"model 'other' \(Request for unknown model.*\)\. It may serve another"
    ):
        generate(triton.address, "a cat", settings={"model": "other"})


@both
def test_silent_server(triton: FakeTriton, generate: Generate, clock: Clock) -> None:
    with pytest.raises(ServerUnavailable, match=r"sent nothing for 0.2 s"):
        # It counts from what the server said last, however long that took.
        generate(
            triton.address,
            "silent",
            settings={"idle_timeout_s": 0.2},
            clock=clock,
            on_progress=lambda progress: clock.run(),
        )
    assert triton.cancelled.wait(LONG_S)


@both
def test_long_requests_are_not_idle(
    triton: FakeTriton, generate: Generate, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_s = 0.05
    began_s, looks = clock(), 0

    def look() -> float:
        nonlocal looks
        looks += threading.current_thread().name == "diffuserve-watchdog" and clock() > began_s + limit_s
        return clock()

    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=look))

    def stop_late(progress: Progress) -> None:
        clock.advance(limit_s / 20)
        if clock() > began_s + 2 * limit_s and (looks > 1 or generate is generate_with_async_client):
            raise KeyError("long enough")

    with pytest.raises(KeyError):
        generate(triton.address, "endless", settings={"idle_timeout_s": limit_s}, clock=clock, on_progress=stop_late)


@contextmanager
def server_process() -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, str(Path(fake_triton.__file__))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, f"127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


@both
@pytest.mark.parametrize("prompt", ["endless", "silent"])
def test_server_killed_during_a_request(generate: Generate, prompt: str) -> None:
    with server_process() as (process, address):

        def kill(progress: Progress) -> None:
            os.kill(process.pid, signal.SIGKILL)

        with pytest.raises(ServerUnavailable, match=f"connection to {address} broke during the request"):
            generate(address, prompt, on_progress=kill)


def test_is_ready(triton: FakeTriton) -> None:
    async def ask(model: str) -> bool:
        async with AsyncClient(triton.address, model=model) as client:
            return await client.is_ready()

    for model, expected in (("stable_diffusion", True), ("other", False)):
        with Client(triton.address, model=model) as client:
            assert client.is_ready() is expected
        assert asyncio.run(ask(model)) is expected


def test_client_finds_a_server_that_starts_later() -> None:
    port = reserved_port()
    with Client(f"127.0.0.1:{port}") as client:
        assert not client.is_ready()
        with FakeTriton(port):
            wait_until(client.is_ready)
            assert client.generate("a cat").seeds == [100]


def test_stream(triton: FakeTriton) -> None:
    with Client(triton.address) as client:
        *steps, result = client.stream("a cat", steps=4, preview=2, num_images=2)
    assert isinstance(result, Result)
    assert [step.step for step in steps if isinstance(step, Progress)] == [0, 1, 2, 3, 4]
    assert [len(step.previews) for step in steps if isinstance(step, Progress)] == [0, 0, 2, 0, 2]
    assert triton.requests[0]["preview"] == 2


def test_stream_checks_its_arguments_at_once() -> None:
    with Client() as client, pytest.raises(TypeError, match="unknown keyword stepps"):
        client.stream("a cat", stepps=3)  # type: ignore[call-arg]


def test_closing_a_stream_cancels_the_request(triton: FakeTriton) -> None:
    with Client(triton.address) as client:
        events = client.stream("endless")
        next(events)
        events.close()
        assert triton.cancelled.wait(LONG_S)
        assert client.generate("a cat").seeds == [100]


def test_a_slow_reader_is_no_silent_server(triton: FakeTriton, clock: Clock) -> None:
    with Client(triton.address, idle_timeout_s=0.2) as client:
        events = []
        for event in client.stream("a cat", steps=2):
            events.append(event)
            clock.advance(3600)
            time.sleep(0.3)  # whoever watches for silence looks in this time
    assert isinstance(events[-1], Result)


def test_many_threads_share_a_client(triton: FakeTriton) -> None:
    with Client(triton.address) as client, ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda seed: client.generate("a cat", seed=seed), range(64)))
    assert [result.seeds for result in results] == [[seed] for seed in range(64)]


def test_closing_the_client_cancels_requests_of_other_threads(triton: FakeTriton) -> None:
    client = Client(triton.address)
    started = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.generate, "endless", on_progress=lambda _: started.set())
        assert started.wait(LONG_S)
        client.close()
        with pytest.raises(Cancelled):
            running.result(LONG_S)
    assert triton.cancelled.wait(LONG_S)
    with pytest.raises(Cancelled, match="client is closed"):
        client.generate("a cat")


def test_no_threads_remain(triton: FakeTriton) -> None:
    before = set(threading.enumerate())
    with Client(triton.address) as client:
        client.generate("a cat")
    wait_until(lambda: not [each for each in set(threading.enumerate()) - before if each.name == "diffuserve-watchdog"])


def test_async_stream(triton: FakeTriton) -> None:
    async def main() -> list[Progress | Result]:
        async with AsyncClient(triton.address) as client:
            return [event async for event in client.stream("a cat", steps=2, preview=True)]

    *steps, result = asyncio.run(main())
    assert isinstance(result, Result)
    assert [len(step.previews) for step in steps if isinstance(step, Progress)] == [0, 1, 1]


def test_closing_an_async_stream_cancels_the_request(triton: FakeTriton) -> None:
    async def main() -> None:
        async with AsyncClient(triton.address) as client:
            async with aclosing(client.stream("endless")) as events:
                async for _ in events:
                    break
            assert await asyncio.to_thread(triton.cancelled.wait, LONG_S)

    asyncio.run(main())


def test_cancelling_a_task_cancels_its_request_only(triton: FakeTriton) -> None:
    async def main() -> None:
        async with AsyncClient(triton.address) as client:
            started = asyncio.Event()
            task = asyncio.create_task(client.generate("endless", on_progress=lambda _: started.set()))
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(triton.cancelled.wait, LONG_S)
            results = await asyncio.gather(*(client.generate("a cat", seed=seed) for seed in range(16)))
            assert [result.seeds for result in results] == [[seed] for seed in range(16)]
        with pytest.raises(Cancelled, match="client is closed"):
            await client.generate("a cat")

    asyncio.run(main())
