"""What is sent again and what is not, on real sockets. A request that a server may have begun is sent once."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import tenacity

from diffuserve.errors import (
    Cancelled,
    DeadlineExceeded,
    DiffuserveError,
    Draining,
    InvalidRequest,
    QueueFull,
    ServerUnavailable,
    StageFailed,
)
from diffuserve_client import AsyncClient, Client, Result, TorchServe, Triton
from diffuserve_client.retries import is_safe, retrying
from tests.client.fake_triton import FakeTriton
from tests.clocks import Clock, run_by
from tests.ports import reserved_port
from tests.waiting import LONG_S, wait_until

Events = Callable[..., list[Any]]


def events_of_client(
    address: str, prompt: str, *, settings: Any = None, clock: Clock | None = None, **fields: Any
) -> list[Any]:
    with Client(address, **(settings or {})) as client:
        return list(client.stream(prompt, **fields))


def events_of_async_client(
    address: str, prompt: str, *, settings: Any = None, clock: Clock | None = None, **fields: Any
) -> list[Any]:
    async def main() -> list[Any]:
        async with (
            AsyncClient(address, **(settings or {})) as client,
            aclosing(client.stream(prompt, **fields)) as events,
        ):
            return [event async for event in events]

    return asyncio.run(main()) if clock is None else run_by(clock, main())


both = pytest.mark.parametrize("stream", [events_of_client, events_of_async_client])


@contextmanager
def raw_server(answer: Callable[[socket.socket], None]) -> Iterator[tuple[str, list[bytes]]]:
    """A server on a real socket; its address, and what each of its connections received until `answer` returned."""
    received: list[bytes] = []

    class Recording:
        def __init__(self, connection: socket.socket) -> None:
            self.connection, self.index = connection, len(received)
            received.append(b"")

        def recv(self, size: int) -> bytes:
            data = self.connection.recv(size)
            received[self.index] += data
            return data

        def sendall(self, data: bytes) -> None:
            self.connection.sendall(data)

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(LONG_S)
                answer(Recording(connection))  # type: ignore[arg-type]

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}", received
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def read_a_request_and_die(connection: socket.socket) -> None:
    """Says that it speaks HTTP/2 (an empty SETTINGS frame), so that gRPC sends the request, and hangs up on it."""
    connection.sendall(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
    data = b""
    while b"stable_diffusion" not in data:
        data += connection.recv(1 << 16)


def hang_up_at_once(connection: socket.socket) -> None:
    pass


@both
@pytest.mark.parametrize("refusal", ["[queue_full retry_after_s=0.05] full", "[draining] stopping"])
def test_what_was_refused_is_sent_again(triton: FakeTriton, stream: Events, refusal: str) -> None:
    events = stream(triton.address, f"first 2 {refusal}", request_id="mine", seed=5)
    assert isinstance(events[-1], Result)
    assert events[-1].seeds == [5]
    assert [event.step for event in events[:-1]] == [0, 1, 2, 3]  # from the third try alone
    assert triton.request_ids == ["mine"] * 3
    assert triton.requests[0] == triton.requests[1] == triton.requests[2]


@both
def test_the_last_error_says_how_often_it_was_tried(triton: FakeTriton, stream: Events) -> None:
    with pytest.raises(Draining, match=r"stopping\. It was tried 3 times\.") as caught:
        stream(triton.address, "error [draining] stopping", settings={"retries": 2})
    assert caught.value.tries == 3
    assert len(triton.requests) == 3


@both
def test_no_retries(triton: FakeTriton, stream: Events) -> None:
    with pytest.raises(Draining, match=r"stopping$") as caught:
        stream(triton.address, "error [draining] stopping", settings={"retries": 0})
    assert caught.value.tries == 1
    assert len(triton.requests) == 1


@both
@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("error [stage_failed] broken", StageFailed),
        ("error [deadline_exceeded] late", DeadlineExceeded),
        ("error [invalid_request] wrong", InvalidRequest),
        ("error [cancelled] gone", Cancelled),
        ("error Request for unknown model: 'stable_diffusion' is not found", ServerUnavailable),
        ("empty", ServerUnavailable),
    ],
)
def test_what_may_have_been_begun_is_sent_once(
    triton: FakeTriton, stream: Events, prompt: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        stream(triton.address, prompt)
    assert len(triton.requests) == 1


@both
def test_a_silent_server_is_asked_once(triton: FakeTriton, stream: Events, clock: Clock) -> None:
    def run_once_asked() -> None:
        wait_until(lambda: bool(triton.requests))
        clock.run()

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(run_once_asked)
        with pytest.raises(ServerUnavailable, match="has sent nothing for"):
            stream(triton.address, "silent", settings={"idle_timeout_s": 0.3}, clock=clock)
        asked.result()
    assert len(triton.requests) == 1


@both
def test_a_model_that_is_not_there_now_is_asked_for_again(triton: FakeTriton, stream: Events) -> None:
    text = "Request for unknown model: 'stable_diffusion' has no available versions"
    assert isinstance(stream(triton.address, f"first 1 {text}")[-1], Result)


@both
@pytest.mark.parametrize("server", [Triton(), TorchServe()], ids=["triton", "torchserve"])
def test_a_server_that_dies_on_a_request_is_not_asked_again(stream: Events, server: Any) -> None:
    with (
        raw_server(read_a_request_and_die) as (address, received),
        pytest.raises(ServerUnavailable, match="broke during the request") as caught,
    ):
        stream(address, "a cat", settings={"retries": 5, "server": server})
    assert not caught.value.never_begun
    assert caught.value.tries == 1
    assert sum(b"stable_diffusion" in data for data in received) == 1


@both
def test_who_hangs_up_before_a_connection_stands_has_seen_no_request(stream: Events) -> None:
    with (
        raw_server(hang_up_at_once) as (address, received),
        pytest.raises(
            ServerUnavailable,
            match=r"No server answers.*\. It was tried 3 times",
        ) as caught,
    ):
        stream(address, "a cat", settings={"retries": 2})
    assert caught.value.never_begun
    assert not any(b"stable_diffusion" in data for data in received)


@both
@pytest.mark.parametrize("server", [Triton(), TorchServe()], ids=["triton", "torchserve"])
def test_nothing_listens(stream: Events, server: Any) -> None:
    port = reserved_port()
    with pytest.raises(
        ServerUnavailable, match=r"No server answers.*diffuserve serve\. It was tried 2 times"
    ) as caught:
        stream(f"127.0.0.1:{port}", "a cat", settings={"retries": 1, "server": server})
    assert caught.value.never_begun


@both
def test_a_listener_that_says_nothing_has_seen_no_request(stream: Events) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        with pytest.raises(ServerUnavailable, match="No server answers") as caught:
            stream(f"127.0.0.1:{mute.getsockname()[1]}", "a cat", settings={"retries": 1, "connect_timeout_s": 0.3})
        assert caught.value.never_begun
        assert caught.value.tries == 2
        mute.settimeout(0)
        while True:  # whatever connections gRPC made
            try:
                connection, _ = mute.accept()
            except BlockingIOError:
                break
            with connection:
                connection.settimeout(0.2)
                with suppress(TimeoutError):
                    while data := connection.recv(1 << 16):
                        assert b"stable_diffusion" not in data


@both
def test_a_server_that_comes_up_meanwhile_draws(stream: Events) -> None:
    server = FakeTriton(port := reserved_port())  # bound, but it takes no connections before it is started
    server_of = threading.Timer(0.4, server.__enter__)
    server_of.start()
    try:
        assert isinstance(stream(f"127.0.0.1:{port}", "a cat", settings={"retries": 20})[-1], Result)
    finally:
        server_of.join()
        server.__exit__()
    assert len(server.requests) == 1


def test_after_the_first_event_nothing_is_sent_again() -> None:
    with FakeTriton(port := reserved_port()) as first, Client(first.address, retries=20) as client:
        events = client.stream("endless")
        assert next(events).step == 0  # type: ignore[union-attr]
        first.__exit__()
        with FakeTriton(port) as second:
            with pytest.raises(DiffuserveError) as caught:
                list(events)
            assert caught.value.tries == 1
            assert isinstance(client.generate("a cat"), Result)
            assert [request["prompt"] for request in second.requests] == ["a cat"]


@both
def test_a_later_try_has_what_is_left_of_the_timeout(triton: FakeTriton, stream: Events) -> None:
    stream(triton.address, "first 2 [queue_full retry_after_s=0.2] full", timeout_s=3600)
    timeouts_ms = [request["timeout_ms"] for request in triton.requests]
    assert timeouts_ms[0] == 3_600_000
    assert timeouts_ms[1] <= 3_599_800
    assert timeouts_ms[2] <= timeouts_ms[1] - 200


@both
def test_no_pause_is_begun_that_ends_after_the_timeout(triton: FakeTriton, stream: Events) -> None:
    with pytest.raises(QueueFull) as caught:
        stream(triton.address, "error [queue_full retry_after_s=60] full", timeout_s=20)
    assert caught.value.tries == 1
    assert len(triton.requests) == 1


def test_a_client_that_is_closed_in_a_pause_is_not_revived(triton: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(triton.address)
    monkeypatch.setattr(tenacity.nap, "time", SimpleNamespace(sleep=lambda seconds: client.close()))
    with pytest.raises(Cancelled):
        client.generate("first 1 [queue_full retry_after_s=60] full")
    assert len(triton.requests) == 1


def test_pauses_grow_and_keep_the_servers_hint() -> None:
    """With the largest jitter: bounds that double from 0.25 s up to 8 s, on top of the hint."""
    slept: list[float] = []
    policy = retrying(8, None, jitter=lambda low, high: high)

    def refuse() -> None:
        raise QueueFull("full", retry_after_s=1.0)

    with pytest.raises(QueueFull):
        tenacity.Retrying(**policy, sleep=slept.append)(refuse)
    assert slept == [1.25, 1.5, 2, 3, 5, 9, 9, 9]


def test_jitter_is_full() -> None:
    slept: list[float] = []

    def refuse() -> None:
        raise Draining("stopping")

    for _ in range(200):
        with pytest.raises(Draining):
            tenacity.Retrying(**retrying(1, None), sleep=slept.append)(refuse)
    assert 0 <= min(slept) < 0.05
    assert 0.2 < max(slept) <= 0.25


@pytest.mark.parametrize(
    ("error", "safe"),
    [
        (QueueFull("x"), True),
        (Draining("x"), True),
        (ServerUnavailable("x", never_begun=True), True),
        (ServerUnavailable("x"), False),
        (StageFailed("x"), False),
        (DeadlineExceeded("x"), False),
        (Cancelled("x"), False),
        (InvalidRequest("x"), False),
        (KeyboardInterrupt(), False),
        (None, False),
    ],
)
def test_what_is_safe(error: BaseException | None, safe: bool) -> None:
    assert is_safe(error) is safe


@pytest.mark.parametrize("retries", [-1, 1.5, True, "3"])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_what_is_no_number_of_retries(kind: type[Client] | type[AsyncClient], retries: Any) -> None:
    with pytest.raises(InvalidRequest, match="must be a whole number from 0"):
        kind(retries=retries)


def test_cancelling_a_task_ends_its_pause(triton: FakeTriton) -> None:
    async def main() -> None:
        async with AsyncClient(triton.address) as client:
            task = asyncio.create_task(client.generate("error [queue_full retry_after_s=60] full"))
            await asyncio.to_thread(wait_until, lambda: bool(triton.requests))
            await asyncio.sleep(0.1)  # it is answered, and the pause begins
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    assert len(triton.requests) == 1
