from __future__ import annotations

import pytest

from diffuserve_bench.cancel import quarters
from diffuserve_loadtest.report.summary import summarise, throughput


def test_percentiles_are_interpolated() -> None:
    summary = summarise([float(value) for value in range(101)])
    assert (summary.mean, summary.p50, summary.p95, summary.p99) == (50, 50, 95, 99)
    assert summary.cells() == ("50.00", "50.00", "95.00", "99.00")


def test_nothing_has_no_summary() -> None:
    with pytest.raises(ValueError, match="nothing"):
        summarise([])


def test_throughput_of_steady_completions() -> None:
    assert throughput([0.5 * number for number in range(1, 31)], warm_up=10) == pytest.approx(2.0)


def test_throughput_of_bursts_is_that_of_whole_rounds() -> None:
    completed_s = [10.0 * burst + 0.01 * number for burst in range(1, 5) for number in range(8)]
    assert throughput(completed_s, warm_up=8) == pytest.approx(0.8)


@pytest.mark.parametrize("warm_up", [0, 3])
def test_throughput_needs_completions_after_the_warm_up(warm_up: int) -> None:
    with pytest.raises(ValueError, match="too few"):
        throughput([1.0, 2.0, 3.0], warm_up)


def test_quarters() -> None:
    assert quarters([1, 1, 5, 5, 5, 5, 9, 11]) == (1, 10)
    assert quarters([3]) == (3, 3)
