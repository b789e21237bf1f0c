"""Ten times as many requests as the server can draw: it must go on drawing as many as it can, and refuse the rest at once."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field

from diffuserve.errors import QueueFull
from diffuserve_client import AsyncClient
from diffuserve_faults.case import Cases, Trial
from diffuserve_faults.known_answers import KnownAnswer, ask
from diffuserve_faults.tally import Tally
from diffuserve_loadtest.report.summary import summarise

_USERS = 16
_CAPACITY_S = 10.0
_DURATION_S = 30.0
# The first three say what the most is that can be had, the last is the fault.
_LOADS = (0.8, 1.2, 2.0, 10.0)
_LEAST_GOODPUT = 0.9
_MOST_REFUSAL_S = 0.1
# A request's own timeout, as a multiple of what one takes on a server that is kept full by `_USERS`.
_PATIENCE = 1.0


@dataclass
class _Run:
    """One open loop: answers in time, and the seconds after which each refusal came."""

    tally: Tally = field(default_factory=Tally)
    refused_s: list[float] = field(default_factory=list)
    duration_s: float = 0.0

    @property
    def goodput_per_s(self) -> float:
        return self.tally.answered / self.duration_s


def overload(trial: Trial) -> None:
    """Requests without retries, each with a timeout, as strangers send them."""
    capacity_per_s = asyncio.run(_capacity(trial))
    timeout_s = _PATIENCE * _USERS / capacity_per_s
    runs = {load: asyncio.run(_open_loop(trial, load * capacity_per_s, timeout_s)) for load in _LOADS}
    for run in runs.values():
        trial.tally.answered += run.tally.answered
        trial.tally.refused += run.tally.refused
        trial.tally.lost += run.tally.lost
    most, last = max(run.goodput_per_s for run in runs.values()), runs[_LOADS[-1]]
    trial.notes |= {
        "capacity_per_s": capacity_per_s,
        "timeout_s": timeout_s,
        **{f"goodput_per_s_at_{load:g}": run.goodput_per_s for load, run in runs.items()},
        "goodput_share": last.goodput_per_s / most,
        "expired_at_most_load": last.tally.refused["deadline_exceeded"],
    }
    if last.goodput_per_s < _LEAST_GOODPUT * most:
        trial.problems.append(f"goodput fell to {last.goodput_per_s / most:.0%} of its maximum")
    if last.refused_s:
        refusal_s = summarise(last.refused_s).p95
        trial.notes["refusal_p95_s"] = refusal_s
        if refusal_s > _MOST_REFUSAL_S:
            trial.problems.append(f"a refusal took {refusal_s:.3f} s (95th percentile)")
    else:
        trial.problems.append("nothing was refused")


async def _capacity(trial: Trial) -> float:
    """Requests a second when there is always one more."""
    tally, answers, started_s = Tally(), trial.answers, time.monotonic()
    end_s = started_s + trial.seconds(_CAPACITY_S)
    async with AsyncClient(trial.address.grpc, model=trial.model) as client:

        async def user(number: int) -> None:
            turn = number
            while time.monotonic() < end_s:
                await ask(client, answers[turn % len(answers)], tally, 60.0)
                turn += _USERS

        await asyncio.gather(*(user(number) for number in range(_USERS)))
    return max(tally.answered, 1) / (time.monotonic() - started_s)


async def _open_loop(trial: Trial, rate_per_s: float, timeout_s: float) -> _Run:
    choose = random.Random(3)  # noqa: S311 - a load, no secret
    run = _Run()
    async with AsyncClient(trial.address.grpc, model=trial.model, retries=0) as client:

        async def one(known: KnownAnswer) -> None:
            sent_s = time.monotonic()
            if await ask(client, known, run.tally, timeout_s) == QueueFull.code:
                run.refused_s.append(time.monotonic() - sent_s)

        started_s = time.monotonic()
        due_s, tasks = started_s, []
        while due_s < started_s + trial.seconds(_DURATION_S):
            await asyncio.sleep(due_s - time.monotonic())
            tasks.append(asyncio.create_task(one(choose.choice(trial.answers))))
            due_s += choose.expovariate(rate_per_s)
        await asyncio.gather(*tasks)
        run.duration_s = time.monotonic() - started_s
    return run


CASES: Cases = {"overload": ("ten times as many requests as can be drawn", overload)}
