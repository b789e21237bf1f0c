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

REQUESTS = (
    Requests(
        steps=2,
        negative_prompt="blurred",
        sampler="euler",
        priority=1,
        timeout_ms=60_000,
        format="jpeg",
    ),
    Requests(steps=2, width=64, height=128, num_images=2, guidance_scale=1.0),
    Requests(steps=100, cancel_share=1.0, cancel_after_s=(0.2, 0.5)),
    Requests(steps=1000),
)


def load(requests: tuple[Requests, ...]) -> Workload:
    return Workload(
        "A test.",
        Bursts(rate_per_s=8, size=8),
        requests,
        duration_s=1.0,
        warm_up_s=0.0,
        patience_s=60.0,
    )


@pytest.mark.parametrize("protocol", ["triton-grpc", "triton-http", "triton-stream"])
def test_triton(server: TritonServer, protocol: Protocol) -> None:
    url = server.address.grpc if protocol == "triton-grpc" else server.address.http
    recording, _ = generate(load(REQUESTS), Target(protocol, url))
    found = {record.outcome for record in recording.records}
    assert found == {OK, CANCELLED, "invalid_request"}
    for record in recording.records:
        if record.outcome == "invalid_request":
            assert "steps is 1000" in record.message
        if "64 x 128" in record.kind:
            assert record.outcome == OK
            assert record.images == 2


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
