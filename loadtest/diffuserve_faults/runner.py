"""Runs fault cases one after another and says what was tried, what survived and what was lost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from diffuserve.tensors import STABLE_DIFFUSION
from diffuserve.triton.address import TritonAddress
from diffuserve.triton.repository import check_serves
from diffuserve_faults import connections, garbage, killed, large, overload, silence
from diffuserve_faults.case import Cases, Trial, merged
from diffuserve_faults.checks import differences, pools_bytes, shared_memory_left, take_snapshot
from diffuserve_faults.known_answers import draw_known_answers
from diffuserve_faults.tally import Tally
from diffuserve_loadtest.report.report import Report, Table

CASES: Cases = merged(killed.CASES, connections.CASES, silence.CASES, large.CASES, garbage.CASES, overload.CASES)
_WARM_UP_IMAGES = 16
_WARM_UP_ANSWERS = 100
_WARM_UP_USERS = 24


def run_cases(names: Sequence[str], repository: Path, *, model: str = STABLE_DIFFUSION, scale: float = 1.0) -> Report:
    """Each case on the server that the last one left, and the checks after it.

    Args:
        names: of `CASES`.
        repository: made by `diffuserve assemble`.
        model: which of the repository's is attacked.
        scale: share of the usual number of requests and seconds.
    """
    results: list[dict[str, Any]] = []
    check_serves(repository, model)
    with Trial(repository, TritonAddress.on_free_ports(), model, scale) as trial:
        with trial.client() as client:
            trial.answers = draw_known_answers(client)
        for name in names:
            click.echo(f"{name}: {CASES[name][0]} ...", err=True)
            results.append(_run_case(name, trial))
    left = [path.name for path in shared_memory_left(trial.address)]
    return _report(results, left, {"repository": str(repository), "model": model, "scale": scale})


def _run_case(name: str, trial: Trial) -> dict[str, Any]:
    trial.begin()
    _warm_up(trial)
    before = take_snapshot(trial.server)
    started_s = time.monotonic()
    try:
        CASES[name][1](trial)
    except Exception as error:  # one case's failure is a finding, and leaves the others to be tried
        trial.problems.append(f"the case ended with {error!r}")
    duration_s = time.monotonic() - started_s
    if trial.server.running:  # a new one has yet to become as warm as the last one was
        _warm_up(trial)
    problems = trial.problems + differences(trial, before)
    pools_grew_bytes = pools_bytes(trial.address) - before.pools_bytes
    if not trial.server.running:
        trial.succeed()
    tally = trial.tally
    return {
        "case": name,
        "tried": tally.tried,
        "survived": tally.survived,
        "lost": len(tally.lost),
        "answered": tally.answered,
        "errors": dict(tally.refused),
        "cut": tally.cut,
        "losses": tally.lost[:20],
        "problems": problems,
        "pools_grew_bytes": pools_grew_bytes,
        "duration_s": round(duration_s, 1),
        **trial.notes,
    }


def _warm_up(trial: Trial) -> None:
    """The largest batch, and many small requests, until every process has what it needs for them; once for each server."""
    if trial.server is trial.warm:
        return
    trial.warm = trial.server
    with trial.client() as client:
        for side_px in (64, 128):
            client.generate("a rocket", steps=1, num_images=_WARM_UP_IMAGES, width=side_px, height=side_px)
    tally = Tally()
    with trial.background(tally, users=_WARM_UP_USERS) as background:
        background.wait_for_answers(trial.times(_WARM_UP_ANSWERS))


def _report(results: list[dict[str, Any]], left: list[str], settings: dict[str, Any]) -> Report:
    lost = sum(result["lost"] for result in results)
    header = ("case", "tried", "survived", "lost", "right images", "errors seen", "given up", "after it")
    rows = [
        (
            result["case"],
            str(result["tried"]),
            str(result["survived"]),
            str(result["lost"]),
            str(result["answered"]),
            str(sum(result["errors"].values())),
            str(result["cut"]),
            "as before" if not result["problems"] else f"{len(result['problems'])} problems",
        )
        for result in results
    ]
    remarks = [f"{result['case']}: {line}" for result in results for line in (*result["losses"], *result["problems"])]
    remarks += [f"left in shared memory: {name}" for name in left]
    return Report(
        "faults",
        settings,
        {"cases": results, "lost": lost, "left": left, "passed": not remarks},
        [Table("Faults", header, rows)],
        remarks,
    )
