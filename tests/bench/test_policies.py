from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from diffuserve.bundle.manifest import read_manifest
from diffuserve_bench.contenders import INFLIGHT, NONE
from diffuserve_bench.mixture import backlog, poisson
from diffuserve_bench.policies import Simulation, measure_policies
from tests.core.fakes import make_bundle


def test_a_request_alone_takes_its_own_time(tmp_path: Path) -> None:
    simulation = Simulation(make_bundle(tmp_path))
    for kind in simulation.kinds:
        answered = simulation.run(INFLIGHT, backlog([kind], 1, seed=0))
        assert answered.latency_s == pytest.approx([simulation.alone_s(answered.requests[0])])


def test_one_at_a_time_is_a_queue(tmp_path: Path) -> None:
    simulation = Simulation(make_bundle(tmp_path))
    answered = simulation.run(NONE, poisson(simulation.kinds, 1e6, 3, seed=0))
    ends_s = list(itertools.accumulate(map(simulation.alone_s, answered.requests)))
    assert answered.latency_s == pytest.approx(ends_s, abs=1e-4)


def test_contenders_meet_the_same_load(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    report = measure_policies(
        tmp_path / "bundle", policies=("fair", "srpt"), utilisations=(0.5, 0.9), requests=40, seeds=2
    )
    outcomes = {(one["contender"], one["utilisation"]): one for one in report.measured["outcomes"]}
    assert len(outcomes) == 4 * 2
    assert all(one["slowdown"]["p50"] >= 0.999 for one in outcomes.values())
    for contender in ("inflight fair", "inflight srpt"):
        assert outcomes[contender, 0.9]["latency_s"]["mean"] < outcomes["none", 0.9]["latency_s"]["mean"]
        assert outcomes[contender, 0.5]["slowdown"]["mean"] < outcomes[contender, 0.9]["slowdown"]["mean"]
    assert set(report.plots["slowdown"].lines) == {"none", "request", "inflight fair", "inflight srpt"}


def test_capacity_is_that_of_the_cheapest_rows(tmp_path: Path) -> None:
    make_bundle(tmp_path, unet_seconds={1: 0.01, 8: 0.04, 32: 0.2})
    simulation = Simulation(read_manifest(tmp_path))
    rows = sum(
        request.unet_rows * simulation.area(simulation.size(request)) for request in simulation.one_of_each
    ) / len(simulation.kinds)
    assert simulation.capacity_per_s == pytest.approx(1 / (rows * 0.005))
