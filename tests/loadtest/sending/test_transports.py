"""Each protocol against the real servers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from diffuserve.triton.launcher import TritonServer
from diffuserve_loadtest.sending.generator import generate
from diffuserve_loadtest.sending.records import CANCELLED, OK
from diffuserve_loadtest.sending.target import Protocol, Target
from diffuserve_loadtest.server.under_test import UnderTest, started_torchserve
from diffuserve_loadtest.workload.arrivals import Bursts
from diffuserve_loadtest.workload.workload import Requests, Workload
from tests.gate import Gate
from tests.waiting import LONG_S

REQUESTS = (
    Requests(
        steps=2,
        negative_prompt="blurred",
        sampler="euler",
        priority=1,
        timeout_ms=600_000,
        format="jpeg",
    ),
    Requests(steps=2, width=64, height=128, num_images=2, guidance_scale=1.0),
    Requests(steps=1000),
)
CANCELLED_ONES = (Requests(steps=150, width=64, height=64, cancel_share=1.0, cancel_after_s=(0.1, 0.3)),)


def load(requests: tuple[Requests, ...], count: int = 8) -> Workload:
    return Workload(
        "A test.",
        Bursts(rate_per_s=count, size=count),
        requests,
        duration_s=1.0,
        warm_up_s=0.0,
        patience_s=LONG_S,
    )


@pytest.mark.parametrize("protocol", ["triton-grpc", "triton-http", "triton-stream"])
def test_triton(server: TritonServer, gate: Gate, protocol: Protocol) -> None:
    url = server.address.grpc if protocol == "triton-grpc" else server.address.http
    target = Target(protocol, url)
    recording, _ = generate(load(REQUESTS), target)
    found = {record.outcome for record in recording.records}
    assert found == {OK, "invalid_request"}
    for record in recording.records:
        if record.outcome == "invalid_request":
            assert "steps is 1000" in record.message
        if "64 x 128" in record.kind:
            assert record.outcome == OK
            assert record.images == 2
    with gate.closed():
        recording, _ = generate(load(CANCELLED_ONES, 2), target)
    assert {record.outcome for record in recording.records} == {CANCELLED}


@pytest.fixture(scope="module")
def torchserve(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[UnderTest]:
    from diffuserve_export.repository.archive import archive_from_bundle

    archive = tmp_path_factory.mktemp("mar") / "m.mar"
    archive_from_bundle(bundle, archive)
    with started_torchserve(archive, "torchserve-grpc") as server:
        yield server


@pytest.mark.slow
def test_torchserve_by_grpc(torchserve: UnderTest) -> None:
    recording, _ = generate(load(REQUESTS[:2]), torchserve.target, key_file=torchserve.key_file)
    assert {record.outcome for record in recording.records} == {OK}
