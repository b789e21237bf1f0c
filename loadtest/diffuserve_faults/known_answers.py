"""Requests whose images are known, so that each answer can be checked."""

from __future__ import annotations

import asyncio
import hashlib
import random
import uuid
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from diffuserve.errors import DiffuserveError
from diffuserve_client import AsyncClient, Client, Result
from diffuserve_faults.tally import Tally

# Beyond a request's own timeout: what the client may take to notice and to say so.
GRACE_S = 5.0


@dataclass(frozen=True)
class KnownAnswer:
    """A request, and the SHA-256 of the pixels that it gives."""

    fields: dict[str, Any]
    sha256: str


def draw_known_answers(client: Client, count: int = 12) -> list[KnownAnswer]:
    """Draws requests that differ in everything, one after another, so that nothing can get mixed up."""
    choose = random.Random(7)  # noqa: S311 - a load, no secret
    answers = []
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
        await asyncio.wait_for(read(), timeout_s + GRACE_S)
    except TimeoutError:
        return tally.lose(f"no answer and no error within {timeout_s + GRACE_S:g} s")
    except DiffuserveError as error:
        return tally.lose(f"an answer and an error, {error.code}") if results else tally.refuse(error.code)
    if len(results) != 1:
        return tally.lose(f"{len(results)} answers")
    if results[0].request_id != request_id:
        return tally.lose("the answer to another request")
    if _digest(results[0]) != known.sha256:
        return tally.lose("a wrong image")
    return tally.answer()
