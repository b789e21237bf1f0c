"""What the metrics endpoint of the real server says of requests that end in different ways."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from diffuserve.errors import DeadlineExceeded
from diffuserve.stats import HISTOGRAM, METRICS
from diffuserve.triton.launcher import TritonServer
from diffuserve_client import Client, Progress
from tests.gate import Gate
from tests.metrics import COUNTING, counted, values
from tests.waiting import wait_for


def gauges(server: TritonServer) -> list[float]:
    found = values(server.address)
    return [found[name] for name in ("requests_waiting", "requests_running", "rows_waiting", "rows_running")]


def test_every_metric_is_there(client: Client, server: TritonServer, gate: Gate) -> None:
    client.generate("an apple", steps=2)
    found = counted(server.address, client, gate)
    for metric in METRICS:
        assert (f"{metric.name}_count" if metric.kind == HISTOGRAM else metric.name) in found


def test_each_end_is_counted(client: Client, server: TritonServer, gate: Gate) -> None:
    before = counted(server.address, client, gate)
    client.generate("a pear", steps=3, num_images=2, guidance_scale=1)
    with gate.closed(), pytest.raises(DeadlineExceeded):
        client.generate("a pear", steps=150, num_images=16, timeout_s=0.2)
    with gate.closed(after=3):
        events = client.stream("a pear", steps=150)
        for event in events:
            if isinstance(event, Progress) and event.step == 2:
                break
        events.close()
        wait_for([0] * 4, lambda: gauges(server))  # while it cannot have come to its end
    after = counted(server.address, client, gate)
    added = {name: after[name] - before.get(name, 0) for name in after}
    assert added["requests_completed"] == 1 + COUNTING
    assert added["images"] == 2 + COUNTING
    assert added["requests_expired"] == 1
    assert added["requests_cancelled"] == 1
    assert added["request_seconds_count"] == 1 + COUNTING
    assert added["unet_call_rows_count"] == added["unet_calls"] >= 5
    assert added["unet_call_rows_sum"] == added["unet_rows"]


def test_running_rows_show_and_go(client: Client, server: TritonServer, gate: Gate) -> None:
    with gate.closed(after=1), ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.generate, "a rocket", steps=60, num_images=3)
        wait_for([0, 1, 0, 6], lambda: gauges(server))
        gate.open()
        running.result()
    wait_for([0] * 4, lambda: gauges(server))


def test_position_and_remaining_time_are_told(client: Client) -> None:
    progress = [event for event in client.stream("a rocket", steps=12) if isinstance(event, Progress)]
    assert progress[0].step == 0
    assert progress[0].position == 0
    remaining_s = [event.eta_s for event in progress[1:]]
    assert all(seconds is not None for seconds in remaining_s)
    assert remaining_s[-1] == 0
    assert all(seconds > 0 for seconds in remaining_s[:-1])  # type: ignore[operator]
