"""When requests are due."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffuserve.errors import InvalidRequest
from diffuserve_loadtest.workload.arrivals import Arrivals, Bursts, Closed, Constant, Poisson, Replay
from diffuserve_loadtest.workload.due_times import due_times
from diffuserve_loadtest.workload.workload import Workload

RATES = st.floats(0.5, 20)
OPEN = st.sampled_from([Poisson, Constant, Bursts])


def workload(arrivals: Arrivals, duration_s: float = 100.0, seed: int = 1) -> Workload:
    return Workload("A test.", arrivals, duration_s=duration_s, seed=seed)


@given(OPEN, RATES, st.integers(0, 1000))
def test_times_rise_stay_within_the_run_and_follow_from_the_seed(kind: type, rate: float, seed: int) -> None:
    load = workload(kind(rate_per_s=rate), seed=seed)
    times = list(due_times(load))
    assert times == sorted(times)
    assert all(0 <= at_s < load.duration_s for at_s in times)
    assert times == list(due_times(load))


@given(OPEN, RATES, RATES)
def test_a_rate_that_changes_brings_its_mean(kind: type, first: float, last: float) -> None:
    expected = 100 * (first + last) / 2
    # Poisson counts deviate by their root; bursts by one burst.
    assert len(list(due_times(workload(kind(rate_per_s=(first, last)))))) == pytest.approx(
        expected, abs=6 * expected**0.5 + 10
    )


@given(RATES, RATES)
def test_a_linear_rate_brings_three_quarters_of_its_rise_in_the_second_half(first: float, last: float) -> None:
    times = list(due_times(workload(Constant(rate_per_s=(first, last)))))
    in_first_half = 50 * first + 50 * (last - first) / 4
    assert sum(at_s < 50 for at_s in times) == pytest.approx(in_first_half, abs=2)


@given(RATES)
def test_a_clock_has_equal_gaps(rate: float) -> None:
    times = list(due_times(workload(Constant(rate_per_s=rate))))
    assert all(b - a == pytest.approx(1 / rate) for a, b in itertools.pairwise(times))


def test_poisson_gaps_are_exponential() -> None:
    times = list(due_times(workload(Poisson(rate_per_s=2), duration_s=20_000)))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.5, rel=0.03)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.06)
    assert sum(gap > mean for gap in gaps) / len(gaps) == pytest.approx(0.3679, abs=0.01)


def test_another_seed_gives_other_times() -> None:
    assert list(due_times(workload(Poisson(rate_per_s=1), seed=1))) != list(
        due_times(workload(Poisson(rate_per_s=1), seed=2))
    )


def test_bursts_come_together_at_the_mean_rate() -> None:
    times = list(due_times(workload(Bursts(rate_per_s=1, size=10))))
    assert [len(list(burst)) for _, burst in itertools.groupby(times)] == [10] * 10


def test_a_file_of_times_is_replayed_in_order_and_faster(tmp_path: Path) -> None:
    file = tmp_path / "times.csv"
    file.write_text("time,who\n3,a\n1.5,b\n\n400,c\n")
    assert list(due_times(workload(Replay(str(file))))) == [1.5, 3.0]
    assert list(due_times(workload(Replay(str(file), speed=2)))) == [0.75, 1.5]


@pytest.mark.parametrize(
    ("text", "words"),
    [("time\n1\nsoon\n", "first column must be seconds"), ("1\n-2\n", "not negative"), ("1\nnan\n", "must be finite")],
)
def test_a_file_that_is_no_list_of_times_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "times.csv"
    file.write_text(text)
    with pytest.raises(InvalidRequest, match=words):
        list(due_times(workload(Replay(str(file)))))


def test_a_file_that_is_missing_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"nowhere\.csv cannot be replayed"):
        list(due_times(workload(Replay("nowhere.csv"))))


def test_a_load_without_a_capacity_says_what_is_missing() -> None:
    with pytest.raises(InvalidRequest, match="--capacity-per-s"):
        list(due_times(workload(Poisson(load=0.8))))
    assert list(due_times(workload(Constant(load=0.5)).at_capacity(2))) == list(
        due_times(workload(Constant(rate_per_s=1)))
    )


def test_a_closed_loop_has_no_due_times() -> None:
    with pytest.raises(TypeError):
        due_times(workload(Closed(1)))
