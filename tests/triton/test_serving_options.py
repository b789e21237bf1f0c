"""What `assemble` can set besides the defaults, each on a server of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from diffuserve.bundle.manifest import read_manifest
from diffuserve.errors import QueueFull
from diffuserve.limits import Limits
from diffuserve.serving_options import Serving
from diffuserve.trials.similarity import psnr_db
from diffuserve.triton.address import TritonAddress
from diffuserve.triton.launcher import TritonServer
from diffuserve_client import Client
from diffuserve_export.repository.assemble import repository_from_bundle
from tests.gate import Gate
from tests.metrics import values, waiting_and_running
from tests.waiting import wait_for, wait_until

pytestmark = pytest.mark.slow  # three servers


@contextmanager
def serving(bundle: Path, folder: Path, options: Serving, **limits: int) -> Iterator[tuple[TritonServer, Client, Gate]]:
    own = Limits.for_model(read_manifest(bundle).model)
    repository_from_bundle(bundle, folder, replace(own, **limits), options)
    aside = folder.with_name("gate")
    aside.mkdir()
    gate = Gate(aside)
    gate.guard(folder)
    try:
        with TritonServer(folder, TritonAddress.on_free_ports()) as server, Client(server.address.grpc) as client:
            yield server, client, gate
    finally:
        shutil.rmtree(folder)


def test_two_unets_each_have_a_call_in_flight_and_the_images_are_the_same(
    bundle: Path, tmp_path: Path, client: Client
) -> None:
    requests = [{"prompt": "an apple", "seed": seed, "steps": 6, "format": "raw"} for seed in range(6)]
    expected = [client.generate(**request).images[0] for request in requests]  # type: ignore[arg-type]
    with (
        serving(bundle, tmp_path / "two", Serving(unet_instances=2), max_rows=4) as (_, two, _),
        ThreadPoolExecutor(6) as pool,
    ):
        images = list(pool.map(lambda request: two.generate(**request).images[0], requests))
    for image, reference in zip(images, expected, strict=True):
        assert psnr_db(image, reference) >= 50


def test_the_request_level_baseline_batches_what_agrees(bundle: Path, tmp_path: Path) -> None:
    with (
        serving(bundle, tmp_path / "request", Serving(batching="request")) as (server, client, gate),
        ThreadPoolExecutor(8) as pool,
    ):
        with gate.closed():
            drawn = [pool.submit(client.generate, "an apple", seed=seed, steps=4 + seed % 2) for seed in range(8)]
            wait_for([8, 0], lambda: waiting_and_running(server.address))
            wait_until(lambda: gate.holds)
        assert all(each.result().images for each in drawn)
    # Two batches, of four steps and of five; or three, if the first began before all of its kind had come. One request after
    # the other would be 36 calls.
    assert gate.came in (4 + 5, 4 + 4 + 5, 5 + 4 + 5)


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(bundle: Path, tmp_path: Path) -> None:
    limits = {"max_active_images": 1, "max_waiting_requests": 2}
    with (
        serving(bundle, tmp_path / "full", Serving(), **limits) as (server, _, gate),
        Client(server.address.grpc, retries=0) as client,
        ThreadPoolExecutor(12) as pool,
    ):
        with gate.closed():
            outcomes = [pool.submit(client.generate, "an apple", seed=seed, steps=25) for seed in range(12)]
            wait_for(10, lambda: sum(outcome.done() for outcome in outcomes))
        refused = [error for outcome in outcomes if (error := outcome.exception())]
        served = [outcome.result() for outcome in outcomes if not outcome.exception()]
        wait_for(10, lambda: values(server.address).get("requests_refused"))
    assert (len(served), len(refused)) == (2, 10)
    for error in refused:
        assert isinstance(error, QueueFull)
        assert 0 < error.retry_after_s <= 60
