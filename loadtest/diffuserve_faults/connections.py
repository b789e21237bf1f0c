"""Connections that break while images are drawn: the others must not notice, and the broken ones' rows must be freed."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable

from diffuserve.errors import DiffuserveError
from diffuserve_client import Client
from diffuserve_faults import raw_http
from diffuserve_faults.case import Cases, Trial
from diffuserve_faults.proxy import Proxy

_USERS = 3
_CLIENTS = 4
_STREAMS = 8
_RESETS = 40
_NOTICE_S = 60.0
# Triton 2.51 misses one now and then, whose reset comes while it begins to answer.
_MISSED_SHARE = 0.1
# As long as a request may be, so that it runs when its client goes.
_LONG = {"prompt": "a rocket", "steps": 150, "width": 64, "height": 64}

_CLIENT = """
import sys, threading, time
from diffuserve_client import Client
client = Client(sys.argv[1], model=sys.argv[3])
def stream(number):
    for event in client.stream("a rocket", steps=150, width=64, height=64, seed=number):
        if event.step == 1:
            print(number, flush=True)
for number in range(int(sys.argv[2])):
    threading.Thread(target=stream, args=(number,), daemon=True).start()
time.sleep(120)
"""


def cut_clients(trial: Trial) -> None:
    """Client processes are killed with many streams in flight."""
    clients = trial.times(_CLIENTS)

    def attack() -> int:
        command = [sys.executable, "-c", _CLIENT, trial.address.grpc, str(_STREAMS), trial.model]
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(clients)]
        try:
            for process in processes:
                for _ in range(_STREAMS):  # a line each, once its first step is done
                    process.stdout and process.stdout.readline()
        finally:
            for process in processes:
                process.kill()
                process.communicate()
        return clients * _STREAMS

    _expect_cancelled(trial, attack)


def cut_http(trial: Trial) -> None:
    """TCP resets in the middle of HTTP streams."""

    def attack() -> int:
        for number in range(trial.times(_RESETS)):
            connection = raw_http.open_stream(trial, {**_LONG, "seed": number, "progress": True})
            connection.recv(1 << 14)
            if number % 2:  # some right at the start, some in the middle
                time.sleep(0.1)
            raw_http.reset(connection)
        return trial.times(_RESETS)

    _expect_cancelled(trial, attack)


def cut_grpc(trial: Trial) -> None:
    """TCP resets of gRPC connections, each with several streams; their clients are told, and send nothing again."""
    rounds = trial.times(_RESETS // _STREAMS)
    errors: list[str] = []

    def stream(client: Client, started: threading.Semaphore) -> None:
        try:
            for event in client.stream(**_LONG):  # type: ignore[arg-type]
                if getattr(event, "step", 0) == 1:
                    started.release()
            errors.append("none")
        except DiffuserveError as error:
            errors.append(error.code)

    def attack() -> int:
        for _ in range(rounds):
            started = threading.Semaphore(0)
            with (
                Proxy("127.0.0.1", trial.address.grpc_port) as proxy,
                Client(proxy.address, model=trial.model, retries=5) as client,
            ):
                threads = [threading.Thread(target=stream, args=(client, started)) for _ in range(_STREAMS)]
                for thread in threads:
                    thread.start()
                for _ in threads:
                    started.acquire(timeout=_NOTICE_S)
                proxy.reset()
                for thread in threads:
                    thread.join(_NOTICE_S)
        return rounds * _STREAMS

    _expect_cancelled(trial, attack)
    wrong = [code for code in errors if code != "server_unavailable"]
    if wrong or len(errors) != rounds * _STREAMS:
        trial.problems.append(f"of {rounds * _STREAMS} streams {len(errors)} ended, with {sorted(set(wrong))}")


def _expect_cancelled(trial: Trial, attack: Callable[[], int]) -> None:
    """The server has to notice all but a few as cancelled; the background shares the batches with them."""
    before = trial.metrics()["requests_cancelled"]
    with trial.background(users=_USERS) as background:
        count = attack()
        background.wait_for_answers(1)
        end_s = time.monotonic() + _NOTICE_S
        while True:
            noticed = int(trial.metrics()["requests_cancelled"] - before)
            if noticed >= count or time.monotonic() > end_s:
                break
            time.sleep(0.1)
    trial.tally.give_up(count)
    # Those are drawn to their end for nobody; that nothing runs afterwards is checked for all cases.
    trial.notes["unnoticed"] = missed = max(0, count - noticed)
    if missed > max(1, _MISSED_SHARE * count):
        trial.problems.append(f"{missed} of {count} cut connections were not noticed within {_NOTICE_S:g} s")


CASES: Cases = {
    "cut-clients": ("client processes are killed", cut_clients),
    "cut-http": ("HTTP streams are reset", cut_http),
    "cut-grpc": ("gRPC connections are reset", cut_grpc),
}
