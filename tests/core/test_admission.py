"""Requests that could not be finished in time are refused when they come, and no others."""

from __future__ import annotations

import math
import random

import pytest

from diffuserve.batching.admission import _MARGIN, Admission
from diffuserve.batching.forecast import CallForecast
from diffuserve.batching.ledger import Entry, Ledger

SHAPE = (4, 8, 8)
SIZE = math.prod(SHAPE)


def entry(evaluations: int, *, end_s: float = math.inf, rows: int = 1, priority: int = 5) -> Entry:
    return Entry(SHAPE, rows, evaluations, priority, end_s)


def admission_with(
    call_s: float, row_s: float, *, max_rows: int = 32, instances: int = 1, ledger: Ledger | None = None
) -> Admission:
    """One that has seen calls of 1 to 8 rows at this cost."""
    admission = Admission(ledger or Ledger(), max_rows, instances)
    for rows in (1, 2, 4, 8) * 5:
        admission.calls.observe(rows * SIZE, call_s + row_s * rows)
    return admission


@pytest.mark.parametrize(("call_s", "row_s"), [(0.02, 0.01), (0.0, 0.01), (0.1, 0.0)])
def test_the_parts_of_a_calls_cost_are_learnt(call_s: float, row_s: float) -> None:
    calls = admission_with(call_s, row_s).calls
    assert calls.seconds(1, 16 * SIZE) == pytest.approx(call_s + 16 * row_s, rel=1e-6)
    assert calls.seconds(3, 16 * SIZE) == pytest.approx(3 * call_s + 16 * row_s, rel=1e-6)


def test_calls_of_one_size_say_nothing_of_the_parts() -> None:
    calls = CallForecast()
    assert calls.seconds(1, SIZE) == 0
    for _ in range(9):
        calls.observe(4 * SIZE, 0.2)
    assert calls.seconds(1, 8 * SIZE) == pytest.approx(0.4)
    assert calls.seconds(1, 2 * SIZE) == pytest.approx(0.1)


def test_noise_makes_neither_part_negative() -> None:
    calls = CallForecast()
    for rows, seconds in ((1, 0.3), (8, 0.1), (1, 0.2), (8, 0.2)):  # falling with the rows
        calls.observe(rows * SIZE, seconds)
    assert calls.seconds(1, 100 * SIZE) >= calls.seconds(1, SIZE) > 0
    steep = CallForecast()
    for rows, seconds in ((1, 0.001), (2, 0.5), (3, 1.2)):
        steep.observe(rows * SIZE, seconds)
    assert steep.seconds(1, 1) > 0


def test_a_server_that_has_become_faster_is_believed() -> None:
    calls = admission_with(1.0, 1.0).calls
    for rows in (1, 2, 4, 8) * 40:
        calls.observe(rows * SIZE, 0.01 * rows)
    assert calls.seconds(1, 8 * SIZE) == pytest.approx(0.08, rel=0.05)


def test_an_idle_server_takes_everything() -> None:
    """Its forecast may be out of date, and only calls can correct it."""
    assert admission_with(10.0, 10.0).excess_s(entry(100, end_s=0.1), 0.0) == 0


def test_a_newcomer_that_would_be_late_itself() -> None:
    admission = admission_with(0.0, 0.01)
    admission._ledger.add(entry(100, rows=4))
    # Ten rounds of five rows, 0.5 s in all.
    needed_s = _MARGIN * 0.5
    assert admission.excess_s(entry(10, end_s=needed_s + 0.01), 0.0) == 0
    assert admission.excess_s(entry(10, end_s=needed_s - 0.1), 0.0) == pytest.approx(0.1)
    assert admission.excess_s(entry(10), 0.0) == 0


def test_a_newcomer_that_would_make_another_late() -> None:
    admission = admission_with(0.0, 0.01)
    admission._ledger.add(entry(10, end_s=_MARGIN * 0.15))
    assert admission.excess_s(entry(10), 0.0) == pytest.approx(_MARGIN * 0.05)
    assert admission.excess_s(entry(5), 0.0) == 0  # there in half of the rounds only


def test_who_is_late_in_any_case_keeps_nobody_out() -> None:
    admission = admission_with(0.0, 0.01)
    admission._ledger.add(entry(1000, end_s=0.1))
    assert admission.excess_s(entry(10, end_s=5.0), 0.0) == 0


def test_who_may_be_late_only_with_the_margin_is_not_given_up() -> None:
    admission = admission_with(0.0, 0.01)
    admission._ledger.add(entry(10, end_s=0.12))
    assert admission.excess_s(entry(10), 0.0) == pytest.approx(_MARGIN * 0.2 - 0.12)
    assert admission.excess_s(entry(10, priority=6), 0.0) == 0  # which goes after it


def test_who_goes_first_does_not_wait_for_the_others() -> None:
    admission = admission_with(0.0, 0.01)
    admission._ledger.add(entry(1000, rows=10))
    assert admission.excess_s(entry(10, end_s=0.2), 0.0) > 0
    assert admission.excess_s(entry(10, end_s=0.2, priority=4), 0.0) == 0
    # And is not made late by who goes after it.
    admission = admission_with(0.0, 0.01)
    admission._ledger.add(entry(10, end_s=_MARGIN * 0.1, priority=4))
    assert admission.excess_s(entry(10, rows=10, priority=5), 0.0) == 0
    assert admission.excess_s(entry(10, rows=10, priority=4), 0.0) > 0


def test_what_does_not_fit_into_one_call_takes_several() -> None:
    ledger = Ledger()
    for _ in range(4):
        ledger.add(entry(10, rows=4))
    one = admission_with(0.1, 0.0, max_rows=32, ledger=ledger)
    two = admission_with(0.1, 0.0, max_rows=8, ledger=ledger)
    # Ten rounds of 18 rows: one call each, or three.
    assert one.excess_s(entry(10, rows=2, end_s=0.0), 0.0) == pytest.approx(_MARGIN * 1.0)
    assert two.excess_s(entry(10, rows=2, end_s=0.0), 0.0) == pytest.approx(_MARGIN * 3.0)
    parallel = admission_with(0.1, 0.0, max_rows=8, instances=3, ledger=ledger)
    assert parallel.excess_s(entry(10, rows=2, end_s=0.0), 0.0) == pytest.approx(_MARGIN * 1.0)


def test_what_else_a_request_takes_counts() -> None:
    admission = admission_with(0.0, 0.01)
    admission._ledger.add(entry(10))
    admission.observe_outside(2.0)
    assert admission.excess_s(entry(10, end_s=0.0), 0.0) == pytest.approx(_MARGIN * (0.2 + 2.0))


@pytest.mark.parametrize("load", [3.0, 10.0])
def test_under_overload_nearly_all_the_work_is_for_requests_that_are_finished(load: float) -> None:
    """In virtual time: Poisson arrivals on a server whose calls cost as forecast."""
    choose = random.Random(1)  # noqa: S311 - a load, no secret
    row_s, call_s, timeout_s = 0.02, 0.005, 2.0
    admission = admission_with(call_s, row_s)
    # Mean rows a request: 1.5 x 40/3.
    rate_per_s = load / (row_s * 20)
    now_s, due_s = 0.0, 0.0
    finished_rows = expired = 0
    rows_of: dict[Entry, int] = {}
    while now_s < 120:
        while due_s <= now_s:
            newcomer = entry(choose.choice((8, 12, 20)), rows=choose.choice((1, 2)), end_s=now_s + timeout_s)
            if admission.excess_s(newcomer, now_s) == 0:
                rows_of[newcomer] = newcomer.rows * newcomer.evaluations_left
                admission._ledger.add(newcomer)
            due_s += choose.expovariate(rate_per_s)
        batch = list(admission._ledger)
        rows = sum(member.rows for member in batch)
        spent_s = call_s + row_s * rows if batch else 0.001
        now_s += spent_s
        if batch:
            admission.calls.observe(rows * SIZE, spent_s)
        for member in batch:
            member.evaluations_left -= 1
            if member.end_s < now_s:
                expired += 1
                admission._ledger.remove(member)
            elif member.evaluations_left == 0:
                finished_rows += rows_of[member]
                admission._ledger.remove(member)
    assert expired == 0
    assert finished_rows * row_s / now_s > 0.8  # of the time went into rows of finished requests
