"""Ordinary requests that go on while something goes wrong, each checked against the image that it must give."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from types import TracebackType

from diffuserve.tensors import STABLE_DIFFUSION
from diffuserve_client import AsyncClient
from diffuserve_faults.known_answers import GRACE_S, KnownAnswer, ask
from diffuserve_faults.tally import Tally


class Background:
    """A context manager: users in a thread of its own who each send the next request when the last has ended. Leaving the
    block waits for those that run.

    Args:
        address: HOST:PORT of gRPC.
        answers: what they ask for, in turn.
        tally: where they count.
        model: which of the server's.
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
        model: str = STABLE_DIFFUSION,
        users: int = 6,
        retries: int = 20,
        timeout_s: float = 60.0,
    ) -> None:
        self._address = address
        self._answers = answers
        self._tally = tally
        self._model = model
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
        self._thread.join(self._timeout_s + 2 * GRACE_S)
        if self._thread.is_alive():
            self._tally.lose("the background load did not end")

    def wait_for_answers(self, count: int, limit_s: float = 60.0) -> None:
        """Returns when so many more have been answered; after `limit_s` the case goes on without."""
        wanted, end_s = self._tally.answered + count, time.monotonic() + limit_s
        while self._tally.answered < wanted and time.monotonic() < end_s:
            time.sleep(0.02)

    async def _run(self) -> None:
        async with AsyncClient(self._address, model=self._model, retries=self._retries) as client:

            async def user(number: int) -> None:
                turn = number
                while not self._stop.is_set():
                    known = self._answers[turn % len(self._answers)]
                    await ask(client, known, self._tally, self._timeout_s)
                    turn += self._users

            await asyncio.gather(*(user(number) for number in range(self._users)))
