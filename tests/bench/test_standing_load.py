from __future__ import annotations

from diffuserve.triton.launcher import TritonServer
from diffuserve_bench.mixture import closed, kind_of
from diffuserve_bench.standing_load import standing_load
from tests.gate import Gate
from tests.metrics import waiting_and_running
from tests.waiting import wait_for


def test_a_server_is_full_when_a_block_begins_and_idle_after_it(server: TritonServer, gate: Gate) -> None:
    # At the gate, so that none ends before the others have come.
    with gate.closed(), standing_load(server, closed([kind_of(100, (64, 64))], 3)):
        assert sum(waiting_and_running(server.address)) == 3
    wait_for([0, 0], lambda: waiting_and_running(server.address))
