from __future__ import annotations

import itertools
from collections import Counter

import msgspec
import pytest

from diffuserve.request import Limits, request_from_fields
from diffuserve_bench.mixture import kinds_of, poisson_arrivals, shuffled_forever, sizes_of
from diffuserve_bench.same import random_requests
from diffuserve_loadtest.stage_seconds import random_sizes
from tests.core.fakes import MODEL


def test_sizes_come_from_the_model() -> None:
    bundled = msgspec.structs.replace(MODEL, width=128, height=128, size_multiple=32)
    assert sizes_of(bundled) == ((128, 128), (64, 96))
    stable_diffusion_1 = msgspec.structs.replace(MODEL, width=512, height=512, size_multiple=64)
    assert sizes_of(stable_diffusion_1) == ((512, 512), (256, 384))


def test_arrivals_come_at_the_rate_with_all_kinds_alike() -> None:
    kinds = kinds_of(MODEL)
    arrivals = poisson_arrivals(kinds, 4.0, 2000, seed=1)
    assert len(arrivals) / arrivals[-1].at_s == pytest.approx(4.0, rel=0.1)
    gaps_s = [later.at_s - earlier.at_s for earlier, later in itertools.pairwise(arrivals)]
    assert min(gaps_s) >= 0
    # Of exponential gaps, 1 - 1/e are shorter than their mean.
    assert sum(gap_s < 0.25 for gap_s in gaps_s) / len(gaps_s) == pytest.approx(0.632, abs=0.04)
    assert set(Counter(arrival.kind for arrival in arrivals).values()) == {2000 // len(kinds)}


def test_another_rate_brings_the_same_requests() -> None:
    slow, fast = (poisson_arrivals(kinds_of(MODEL), rate_per_s, 30, seed=5) for rate_per_s in (1.0, 2.0))
    assert [(one.kind, one.seed) for one in slow] == [(one.kind, one.seed) for one in fast]
    assert [one.at_s for one in slow] == pytest.approx([2 * one.at_s for one in fast])
    assert poisson_arrivals(kinds_of(MODEL), 1.0, 30, seed=5) == slow
    assert poisson_arrivals(kinds_of(MODEL), 1.0, 30, seed=6) != slow


def test_every_request_is_one_that_the_server_takes() -> None:
    kinds = kinds_of(MODEL)
    mixed = [kind.fields(0) for kind in itertools.islice(shuffled_forever(kinds, 0), len(kinds))]
    assert len(mixed) == len({tuple(fields.items()) for fields in mixed})
    for fields in (*mixed, *random_requests(MODEL, 50, seed=0)):
        request_from_fields(fields, MODEL, Limits.for_model(MODEL))
    checked = [request_from_fields(kind.fields(0), MODEL, Limits.for_model(MODEL)) for kind in kinds]
    assert [request.rows for request in checked] == [kind.rows for kind in kinds]


def test_random_sizes_never_repeat() -> None:
    sizes = random_sizes(2000, 32, seed=0)
    assert set(sizes) == set(range(1, 33))
    assert all(earlier != later for earlier, later in itertools.pairwise(sizes))
