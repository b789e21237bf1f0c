"""What the faults count as right, refused and lost, against a server that is told how to behave."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import pytest

from diffuserve_client import AsyncClient, Client
from diffuserve_faults import known_answers
from diffuserve_faults.background import Background
from diffuserve_faults.checks import Snapshot, _grown
from diffuserve_faults.known_answers import KnownAnswer, ask
from diffuserve_faults.proxy import Proxy
from diffuserve_faults.tally import Tally
from tests.client.fake_triton import FakeTriton
from tests.waiting import LONG_S

FIELDS: dict[str, Any] = {"prompt": "a cat", "seed": 7, "format": "raw"}


def known(address: str, **fields: Any) -> KnownAnswer:
    with Client(address) as client:
        return KnownAnswer({**FIELDS, **fields}, known_answers._digest(client.generate(**{**FIELDS, **fields})))


def asked(address: str, answer: KnownAnswer, timeout_s: float = 20.0) -> Tally:
    tally = Tally()

    async def main() -> None:
        async with AsyncClient(address, retries=0) as client:
            await ask(client, answer, tally, timeout_s)

    asyncio.run(main())
    return tally


def test_a_right_image_is_an_answer() -> None:
    with FakeTriton() as triton:
        tally = asked(triton.address, known(triton.address))
    assert (tally.tried, tally.answered, tally.survived, tally.lost) == (1, 1, 1, [])


def test_another_image_is_lost() -> None:
    with FakeTriton() as triton:
        other = KnownAnswer(FIELDS, known(triton.address, seed=8).sha256)
        tally = asked(triton.address, other)
    assert (tally.tried, tally.survived, tally.lost) == (1, 0, ["a wrong image"])


def test_an_error_is_survived_and_counted_by_its_code() -> None:
    with FakeTriton() as triton:
        tally = asked(triton.address, KnownAnswer({"prompt": "error [queue_full retry_after_s=1] full"}, ""))
    assert (tally.survived, dict(tally.refused), tally.lost) == (1, {"queue_full": 1}, [])


def test_no_answer_in_time_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_answers, "GRACE_S", 0.2)
    with FakeTriton() as triton:
        tally = asked(triton.address, KnownAnswer({"prompt": "silent"}, ""), timeout_s=0.1)
    assert tally.lost == ["no answer and no error within 0.3 s"]


class _Twice(FakeTriton):
    """Answers every request two times."""

    def _answers(self, *args: Any) -> Any:
        yield from super()._answers(*args)
        yield from super()._answers(*args)


class _Confused(FakeTriton):
    """Gives everybody the answer to one and the same request."""

    def _answers(self, fields: Any, request_id: str, context: Any) -> Any:
        yield from super()._answers(fields, "another", context)


def test_two_answers_are_lost() -> None:
    with _Twice() as triton:
        with FakeTriton() as right:
            answer = known(right.address)
        assert asked(triton.address, answer).lost == ["2 answers"]


def test_the_answer_to_another_request_is_lost() -> None:
    with _Confused() as triton:
        with FakeTriton() as right:
            answer = known(right.address)
        assert asked(triton.address, answer).lost == ["the answer to another request"]


def test_the_background_asks_until_it_is_left() -> None:
    tally = Tally()
    with FakeTriton() as triton:
        answer = known(triton.address)
        with Background(triton.address, [answer], tally, users=3) as load:
            load.wait_for_answers(10)
        sent = len(triton.requests) - 1
    assert tally.answered == tally.tried == sent >= 10


def test_what_has_grown_is_named() -> None:
    before = Snapshot({"unet": 10, "tritonserver": 70}, {"unet": 100 << 20, "tritonserver": 50 << 20}, 0)
    same = Snapshot({"unet": 11, "tritonserver": 70}, {"unet": 109 << 20, "tritonserver": 57 << 20}, 1 << 30)
    assert _grown(same, before) == []
    more = Snapshot({"unet": 13, "tritonserver": 70}, {"unet": 111 << 20, "tritonserver": 59 << 20}, 0)
    assert _grown(more, before) == [
        "unet has 13 open files, 10 before",
        "unet takes 111 MiB, 100 before",
        "tritonserver takes 59 MiB, 50 before",
    ]


def test_the_proxy_carries_and_resets() -> None:
    before = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as server:
        with (
            Proxy("127.0.0.1", server.getsockname()[1]) as proxy,
            socket.create_connection(("127.0.0.1", int(proxy.address.rpartition(":")[2])), timeout=LONG_S) as client,
        ):
            there, _ = server.accept()
            with there:
                there.settimeout(LONG_S)
                client.sendall(b"ping")
                assert there.recv(10) == b"ping"
                there.sendall(b"pong")
                assert client.recv(10) == b"pong"
                proxy.reset()
                for side in (client, there):
                    with pytest.raises(ConnectionResetError):
                        while side.recv(10):
                            pass
                        raise AssertionError("closed with a farewell")
        assert not set(threading.enumerate()) - before
