from __future__ import annotations

import itertools
from collections import Counter

import msgspec
import pytest

from diffuserve.limits import Limits
from diffuserve.request import request_from_fields
from diffuserve_bench.mixture import backlog, kinds_of, one_of_each, poisson, sizes_of
from diffuserve_bench.same import random_requests
from diffuserve_loadtest.stage_seconds import random_sizes
from diffuserve_loadtest.workload.due_times import due_times
from diffuserve_loadtest.workload.plan import plan
from tests.core.fakes import MODEL


def test_sizes_come_from_the_model() -> None:
    bundled = msgspec.structs.replace(MODEL, width=128, height=128, size_multiple=32)
    assert sizes_of(bundled) == ((128, 128), (64, 96))
    stable_diffusion_1 = msgspec.structs.replace(MODEL, width=512, height=512, size_multiple=64)
    assert sizes_of(stable_diffusion_1) == ((512, 512), (256, 384))


def test_arrivals_come_at_the_rate_with_all_kinds_alike() -> None:
    kinds = kinds_of(MODEL)
    workload = poisson(kinds, 4.0, 2000, seed=1)
    times_s = list(due_times(workload))
    assert len(times_s) == 2000
    assert len(times_s) / times_s[-1] == pytest.approx(4.0, rel=0.1)
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(times_s)]
    assert min(gaps_s) >= 0
    # Of exponential gaps, 1 - 1/e are shorter than their mean.
    assert sum(gap_s < 0.25 for gap_s in gaps_s) / len(gaps_s) == pytest.approx(0.632, abs=0.04)
    counts = Counter(plan(workload, number).kind for number in range(2000))
    assert list(counts.values()) == [2000 // len(kinds)] * len(kinds)


def test_another_rate_brings_the_same_requests() -> None:
    slow, fast = (poisson(kinds_of(MODEL), rate_per_s, 30, seed=5) for rate_per_s in (1.0, 2.0))
    assert [plan(slow, number) for number in range(30)] == [plan(fast, number) for number in range(30)]
    assert list(due_times(slow)) == pytest.approx([2 * at_s for at_s in due_times(fast)])
    other = poisson(kinds_of(MODEL), 1.0, 30, seed=6)
    assert list(due_times(other)) != list(due_times(slow))
    assert [plan(other, number) for number in range(30)] != [plan(slow, number) for number in range(30)]


def test_a_backlog_is_all_there_at_the_start() -> None:
    assert list(due_times(backlog(kinds_of(MODEL), 70, seed=1))) == [0.0] * 70


def test_every_request_is_one_that_the_server_takes() -> None:
    kinds = kinds_of(MODEL)
    requests = one_of_each(backlog(kinds, len(kinds), seed=0))
    assert len({request.kind for request in requests}) == len(kinds)
    for fields in random_requests(MODEL, 50, seed=0):
        request_from_fields(fields, MODEL, Limits.for_model(MODEL))
    checked = [request_from_fields(request.fields, MODEL, Limits.for_model(MODEL)) for request in requests]
    assert [request.rows for request in checked] == [request.rows for request in requests]


def test_random_sizes_never_repeat() -> None:
    sizes = random_sizes(2000, 32, seed=0)
    assert set(sizes) == set(range(1, 33))
    assert all(earlier != later for earlier, later in itertools.pairwise(sizes))
