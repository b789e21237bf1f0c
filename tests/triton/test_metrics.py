"""What the metrics endpoint of the real server says of requests that end in different ways."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from diffuserve.errors import DeadlineExceeded
from diffuserve.stats import HISTOGRAM, METRICS
from diffuserve.triton.launcher import TritonServer
from diffuserve_client import Client, Progress
from tests.metrics import read_metrics


def values(server: TritonServer) -> dict[str, float]:
    time.sleep(0.3)  # figures are brought up to date at intervals
    metrics = read_metrics(server.address.metrics)
    return {
        name.removeprefix("diffuserve_"): value
        for (name, model), value in metrics.items()
        if model == "stable_diffusion"
    }


def test_every_metric_is_there(client: Client, server: TritonServer) -> None:
    client.generate("an apple", steps=2)
    found = values(server)
    for metric in METRICS:
        assert (f"{metric.name}_count" if metric.kind == HISTOGRAM else metric.name) in found


def test_each_end_is_counted(client: Client, server: TritonServer) -> None:
    before = values(server)
    client.generate("a pear", steps=3, num_images=2, guidance_scale=1)
    with pytest.raises(DeadlineExceeded):
        client.generate("a pear", steps=150, num_images=16, timeout_s=0.2)
    events = client.stream("a pear", steps=150)
    for event in events:
        if isinstance(event, Progress) and event.step == 2:
            break
    events.close()
    time.sleep(0.5)
    after = values(server)
    added = {name: after[name] - before.get(name, 0) for name in after}
    assert added["requests_completed"] == 1
    assert added["images"] == 2
    assert added["requests_expired"] == 1
    assert added["requests_cancelled"] == 1
    assert added["request_seconds_count"] == 1
    assert added["unet_call_rows_count"] == added["unet_calls"] >= 5
    assert added["unet_call_rows_sum"] == added["unet_rows"]
    assert [after[name] for name in ("requests_waiting", "requests_running", "rows_waiting", "rows_running")] == [0] * 4


def test_running_rows_show_and_go(client: Client, server: TritonServer) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.generate, "a rocket", steps=60, num_images=3)
        while not values(server)["rows_running"]:
            assert not running.done()
        assert values(server)["rows_running"] == 6
        running.result()
    assert values(server)["rows_running"] == 0


def test_position_and_remaining_time_are_told(client: Client) -> None:
    progress = [event for event in client.stream("a rocket", steps=12) if isinstance(event, Progress)]
    assert progress[0].step == 0
    assert progress[0].position == 0
    remaining_s = [event.eta_s for event in progress[1:]]
    assert all(seconds is not None for seconds in remaining_s)
    assert remaining_s[-1] == 0
    assert remaining_s[1] > remaining_s[-2] > 0  # type: ignore[operator]
