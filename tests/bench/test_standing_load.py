from __future__ import annotations

import time

from diffuserve.triton.launcher import TritonServer
from diffuserve_bench.mixture import closed, kind_of
from diffuserve_bench.standing_load import standing_load
from diffuserve_loadtest.server.metrics import read_metrics


def _requests_at(server: TritonServer) -> float:
    metrics = read_metrics(server.address.metrics)
    return metrics["requests_waiting"] + metrics["requests_running"]


def test_a_server_is_full_when_a_block_begins_and_idle_after_it(server: TritonServer) -> None:
    with standing_load(server, closed([kind_of(100, (64, 64))], 3)):  # which would raise if not all three came
        pass
    give_up_s = time.monotonic() + 30
    while _requests_at(server) and time.monotonic() < give_up_s:
        time.sleep(0.1)
    assert _requests_at(server) == 0
