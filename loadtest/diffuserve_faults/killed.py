"""Processes of the server are killed, or the server is started anew, while requests run."""

from __future__ import annotations

import os
import signal
import time

from diffuserve.tensors import UNET
from diffuserve.triton.configuration import read_stage_models
from diffuserve_faults.case import Cases, Trial
from diffuserve_faults.checks import processes_by_name

_KILLS = 3
_ANSWERS_BETWEEN = 12
_DRAIN_S = 60.0
_NOTICE_S = 60.0


def kill_server(trial: Trial) -> None:
    """SIGKILL to tritonserver; what was in flight fails, the rest finds the successor."""
    with trial.background() as background:
        for _ in range(trial.times(_KILLS)):
            background.wait_for_answers(trial.times(_ANSWERS_BETWEEN))
            os.kill(trial.server.pid, signal.SIGKILL)
            trial.succeed()
        background.wait_for_answers(trial.times(_ANSWERS_BETWEEN))


def kill_inflight_model(trial: Trial) -> None:
    """SIGKILL to the in-flight model's process; the launcher ends Triton, and a successor is started."""
    with trial.background() as background:
        for _ in range(trial.times(_KILLS)):
            background.wait_for_answers(trial.times(_ANSWERS_BETWEEN))
            _kill_model(trial, trial.model)
            end_s = time.monotonic() + _NOTICE_S
            while trial.server.running and time.monotonic() < end_s:
                time.sleep(0.02)
            if trial.server.running:
                trial.problems.append(f"the launcher did not end Triton within {_NOTICE_S:g} s")
            trial.succeed()
        background.wait_for_answers(trial.times(_ANSWERS_BETWEEN))


def kill_stage(trial: Trial) -> None:
    """SIGKILL to the UNet's process; the server loads it again, and no request fails."""
    with trial.background() as background:
        for _ in range(trial.times(_KILLS)):
            background.wait_for_answers(trial.times(_ANSWERS_BETWEEN))
            _kill_model(trial, read_stage_models(trial.repository, trial.model)[UNET])
            trial.files_left += 1  # Triton 2.51 keeps the shared memory of a model's process that was killed
            background.wait_for_answers(trial.times(_ANSWERS_BETWEEN))
    _expect_no_error(trial)


def restart(trial: Trial) -> None:
    """The server drains and is started anew; clients that send refused requests again see no error."""
    with trial.background() as background:
        for _ in range(trial.times(_KILLS)):
            background.wait_for_answers(trial.times(_ANSWERS_BETWEEN))
            if not trial.server.drain(_DRAIN_S):
                trial.problems.append(f"the server did not drain within {_DRAIN_S:g} s")
            trial.succeed()
        background.wait_for_answers(trial.times(_ANSWERS_BETWEEN))
    _expect_no_error(trial)


def _kill_model(trial: Trial, model: str) -> None:
    processes_by_name(trial.server)[model].kill()
    trial.warm = None  # the process that takes its place is cold


def _expect_no_error(trial: Trial) -> None:
    for code, count in trial.tally.refused.items():
        trial.problems.append(f"{count} requests failed ({code}) where none should")


CASES: Cases = {
    "killed-server": ("tritonserver is killed, a successor started", kill_server),
    "killed-inflight": ("the in-flight model's process is killed, a successor started", kill_inflight_model),
    "killed-stage": ("the UNet's process is killed", kill_stage),
    "restarted": ("the server drains and is started anew", restart),
}
