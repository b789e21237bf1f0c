"""Workloads: what is shipped, what a file may say, and the requests that come of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from diffuserve.bundle.manifest import read_manifest
from diffuserve.errors import InvalidRequest
from diffuserve.limits import Limits
from diffuserve.request import request_from_fields
from diffuserve_loadtest.sending.target import Protocol, Target
from diffuserve_loadtest.workload.arrivals import Closed
from diffuserve_loadtest.workload.due_times import due_times
from diffuserve_loadtest.workload.files import read_workload, shipped_workloads, to_yaml
from diffuserve_loadtest.workload.plan import plan
from diffuserve_loadtest.workload.workload import Requests, Workload


def test_the_shipped_ones_are_those_that_the_docs_name() -> None:
    assert shipped_workloads() == ["burst", "cancel-storm", "mixed", "overload", "ramp", "single", "soak"]


@pytest.mark.parametrize("name", shipped_workloads())
def test_what_is_written_is_read_back(name: str, tmp_path: Path) -> None:
    file = tmp_path / "again.yaml"
    file.write_text(to_yaml(read_workload(name)))
    assert read_workload(str(file)) == read_workload(name)


@pytest.mark.parametrize("name", shipped_workloads())
def test_a_server_accepts_every_request_of_those_shipped(name: str, bundle: Path) -> None:
    model = read_manifest(bundle).model
    for number in range(200):
        planned = plan(read_workload(name), number)
        request = request_from_fields(planned.fields, model, Limits.for_model(model))
        assert request.steps * request.rows == planned.unet_rows


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("description: x\narrivals: {process: poisson}\n", "exactly one of rate_per_s and load"),
        (
            "description: x\narrivals: {process: poisson, rate_per_s: 1, load: 1}\n",
            "exactly one of rate_per_s and load",
        ),
        ("description: x\narrivals: {process: constant, rate_per_s: -1}\n", "must be positive"),
        ("description: x\narrivals: {process: tide, rate_per_s: 1}\n", "tide"),
        ("description: x\narrivals: {process: closed, users: 0}\n", "users"),
        ("description: x\narrivals: {process: closed, users: 1}\nrequest: []\n", "unknown field `request`"),
        ("description: x\narrivals: {process: closed, users: 1}\nrequests: []\n", "requests"),
        ("description: x\narrivals: {process: closed, users: 1}\nrequests: [{steps: 0}]\n", "steps must be 1 or more"),
        ("description: x\narrivals: {process: closed, users: 1}\nrequests: [{steps: []}]\n", "steps must be 1 or more"),
        (
            "description: x\narrivals: {process: closed, users: 1}\nrequests: [{cancel_after_s: [2, 1]}]\n",
            "cancel_after_s",
        ),
        ("description: x\narrivals: {process: closed, users: 1}\nduration_s: 5\nwarm_up_s: 5\n", "leave some time"),
        ("description: [\n", "cannot be read"),
    ],
)
def test_what_a_file_says_wrong_is_said(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(InvalidRequest, match=words):
        read_workload(str(file))


def test_a_file_to_replay_stands_beside_the_workload_and_is_found_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("here", "there"):
        Path(folder).mkdir()
    Path("here/w.yaml").write_text("description: x\narrivals: {process: replay, file: times.csv}\n")
    Path("here/times.csv").write_text("1\n2\n")
    workload = read_workload("here/w.yaml")
    assert list(due_times(workload)) == [1, 2]
    Path("there/w.yaml").write_text(to_yaml(workload))
    assert read_workload("there/w.yaml") == workload


def test_a_capacity_is_positive() -> None:
    with pytest.raises(InvalidRequest, match="must be positive"):
        read_workload("mixed").at_capacity(0)


@pytest.mark.parametrize(
    ("protocol", "url", "words"),
    [
        ("triton-grpc", "http://localhost:8001", "must be HOST:PORT"),
        ("triton-http", "localhost:8000", "must be http://HOST:PORT"),
        ("image-http", "https://localhost/draw", "must be http://HOST:PORT"),
        ("triton-grpc", "example.com:8001", "is not this machine"),
        ("triton-http", "http://localhost@example.com", "is not this machine"),
    ],
)
def test_an_address_fits_its_protocol_and_is_here(protocol: Protocol, url: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        Target(protocol, url)


def test_a_name_that_is_none_is_answered_with_those_there_are() -> None:
    with pytest.raises(InvalidRequest, match="burst, cancel-storm, mixed"):
        read_workload("storm")


def test_a_request_is_the_same_in_every_run_and_no_other_is_like_it() -> None:
    mixed = read_workload("mixed")
    first = [plan(mixed, number) for number in range(50)]
    assert first == [plan(mixed, number) for number in range(50)]
    assert len({request.fields["prompt"] for request in first}) == 50
    assert [request.fields["seed"] for request in first] == list(range(50))


def test_the_mixture_has_the_shares_it_says() -> None:
    workload = Workload(
        "A test.",
        Closed(1),
        (
            Requests(weight=3, steps=(10, 20), guidance_scale=(1.0, 5.0)),
            Requests(weight=1, steps=50, cancel_share=0.5, cancel_after_s=(1, 2)),
        ),
    )
    requests = [plan(workload, number) for number in range(4000)]
    steps = Counter(request.fields["steps"] for request in requests)
    assert steps[50] / 4000 == pytest.approx(0.25, abs=0.03)
    assert steps[10] / steps[20] == pytest.approx(1, abs=0.15)
    cancelled = [request for request in requests if request.cancel_after_s is not None]
    assert len(cancelled) / steps[50] == pytest.approx(0.5, abs=0.06)
    assert all(request.fields["steps"] == 50 and 1 <= request.cancel_after_s <= 2 for request in cancelled)


def test_a_short_run_has_the_mixture_too() -> None:
    parts = tuple(Requests(weight=weight, steps=steps) for steps, weight in ((10, 1), (20, 1), (30, 1), (40, 1)))
    workload = Workload("A test.", Closed(1), parts)
    steps = [plan(workload, number).fields["steps"] for number in range(400)]
    blocks = [tuple(steps[first : first + 4]) for first in range(0, 400, 4)]
    assert all(sorted(block) == [10, 20, 30, 40] for block in blocks)
    assert len(set(blocks)) == 24


def test_rows_and_words_follow_from_what_is_asked() -> None:
    workload = Workload(
        "A test.", Closed(1), (Requests(steps=8, num_images=4, guidance_scale=1, width=64, height=128),)
    )
    request = plan(workload, 0)
    assert request.unet_rows == 32
    assert request.kind == "8 steps, 64 x 128, 4 images, unguided"
    assert request.size == (64, 128)
    guided = plan(Workload("A test.", Closed(1), (Requests(steps=8),)), 0)
    assert (guided.unet_rows, guided.kind, guided.size) == (16, "8 steps, guided", (None, None))
