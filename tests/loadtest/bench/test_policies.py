from __future__ import annotations

from pathlib import Path

import pytest

from diffuserve.bundle.manifest import read_manifest
from diffuserve_loadtest.bench.contenders import INFLIGHT, NONE
from diffuserve_loadtest.bench.mixture import Arrival
from diffuserve_loadtest.bench.policies import Simulation, measure_policies
from tests.core.fakes import make_bundle


def test_a_request_alone_takes_its_own_time(tmp_path: Path) -> None:
    simulation = Simulation(make_bundle(tmp_path))
    for kind in simulation.kinds:
        [latency_s] = simulation.latencies_s(INFLIGHT, [Arrival(3.0, kind, 0)])
        assert latency_s == pytest.approx(simulation.alone_s(kind))


def test_one_at_a_time_is_a_queue(tmp_path: Path) -> None:
    simulation = Simulation(make_bundle(tmp_path))
    kinds = simulation.kinds[:3]
    latencies_s = simulation.latencies_s(NONE, [Arrival(0.001 * at, kind, at) for at, kind in enumerate(kinds)])
    ends_s = [sum(map(simulation.alone_s, kinds[: count + 1])) for count in range(3)]
    assert latencies_s == pytest.approx([end_s - 0.001 * at for at, end_s in enumerate(ends_s)])


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
    rows = sum(kind.steps * kind.rows * simulation.area(kind.size) for kind in simulation.kinds) / len(simulation.kinds)
    assert simulation.capacity_per_s == pytest.approx(1 / (rows * 0.005))
