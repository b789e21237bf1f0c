"""Ordinary requests that go on while something goes wrong, each checked against the image that it must give."""

from __future__ import annotations

import asyncio
import hashlib
import random
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from diffuserve.errors import DiffuserveError
from diffuserve_client import AsyncClient, Client, Result
from diffuserve_loadtest.faults.case import Tally

# Beyond a request's own timeout: what the client may take to notice and to say so.
_GRACE_S = 5.0


@dataclass(frozen=True)
class KnownAnswer:
    """A request, and the SHA-256 of the pixels that it gives."""

    fields: dict[str, Any]
    sha256: str


def draw_known_answers(address: str, count: int = 12) -> list[KnownAnswer]:
    """Draws requests that differ in everything, one after another, so that nothing can get mixed up."""
    choose = random.Random(7)  # noqa: S311 - a load, no secret
    answers = []
    with Client(address) as client:
        for number in range(count):
            fields: dict[str, Any] = {
                "prompt": f"a slice of pizza, glossy, number {number}",
                "steps": choose.choice((4, 8, 12)),
                "guidance_scale": choose.choice((1.0, 5.0)),
                "sampler": choose.choice(("dpmpp_2m", "euler", "ddim")),
                "seed": choose.randrange(2**32),
                "width": 64,
                "height": 64,
                "format": "raw",
            }
            answers.append(KnownAnswer(fields, _digest(client.generate(**fields))))
    return answers


def _digest(result: Result) -> str:
    return hashlib.sha256(b"".join(result.encoded)).hexdigest()


async def ask(client: AsyncClient, known: KnownAnswer, tally: Tally, timeout_s: float) -> str:
    """Sends one request and counts what became of it: ok, an error's code, or lost."""
    results: list[Result] = []
    request_id = f"known-{uuid.uuid4().hex}"

    async def read() -> None:
        async with aclosing(client.stream(request_id=request_id, **known.fields, timeout_s=timeout_s)) as events:
            async for event in events:
                if isinstance(event, Result):
                    results.append(event)

    try:
        await asyncio.wait_for(read(), timeout_s + _GRACE_S)
    except TimeoutError:
        return tally.lose(f"no answer and no error within {timeout_s + _GRACE_S:g} s")
    except DiffuserveError as error:
        return tally.lose(f"an answer and an error, {error.code}") if results else tally.refuse(error.code)
    if len(results) != 1:
        return tally.lose(f"{len(results)} answers")
    if results[0].request_id != request_id:
        return tally.lose("the answer to another request")
    if _digest(results[0]) != known.sha256:
        return tally.lose("a wrong image")
    return tally.answer()


class Background:
    """A context manager: users in a thread of its own who each send the next request when the last has ended. Leaving the
    block waits for those that run.

    Args:
        address: HOST:PORT of gRPC.
        answers: what they ask for, in turn.
        tally: where they count.
        users: how many.
        retries: of their client.
        timeout_s: of each request.
    """

    def __init__(
        self,
        address: str,
        answers: Sequence[KnownAnswer],
        tally: Tally,
        *,
        users: int = 6,
        retries: int = 20,
        timeout_s: float = 60.0,
    ) -> None:
        self._address = address
        self._answers = answers
        self._tally = tally
        self._users = users
        self._retries = retries
        self._timeout_s = timeout_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="background load", daemon=True)

    def __enter__(self) -> Background:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(self._timeout_s + 2 * _GRACE_S)
        if self._thread.is_alive():
            self._tally.lose("the background load did not end")

    def wait_for_answers(self, count: int, limit_s: float = 60.0) -> None:
        """Returns when so many more have been answered; after `limit_s` the case goes on without."""
        wanted, end_s = self._tally.answered + count, time.monotonic() + limit_s
        while self._tally.answered < wanted and time.monotonic() < end_s:
            time.sleep(0.02)

    async def _run(self) -> None:
        async with AsyncClient(self._address, retries=self._retries) as client:

            async def user(number: int) -> None:
                turn = number
                while not self._stop.is_set():
                    known = self._answers[turn % len(self._answers)]
                    await ask(client, known, self._tally, self._timeout_s)
                    turn += self._users

            await asyncio.gather(*(user(number) for number in range(self._users)))
