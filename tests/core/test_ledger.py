from __future__ import annotations

import math

from diffuserve.batching.ledger import Entry, Ledger

SHAPE = (4, 8, 8)


def test_entries_wait_until_their_first_step_and_keep_their_order() -> None:
    ledger = Ledger()
    first, second, third = (Entry(SHAPE, 1, rows, 1, 10, 5, math.inf) for rows in (1, 2, 4))
    for entry in (first, second, third):
        ledger.add(entry)
    assert [ledger.position(entry) for entry in (first, second, third)] == [0, 1, 2]
    second.begun, second.evaluations_left = True, 3
    assert ledger.waiting == [first, third]
    assert [ledger.position(entry) for entry in (first, second, third)] == [0, 0, 1]
    assert ledger.gauges() == {
        "requests_waiting": 2,
        "requests_running": 1,
        "rows_waiting": 5,
        "rows_running": 2,
    }
    assert ledger.rows_left == 1 * 10 + 2 * 3 + 4 * 10
    ledger.remove(first)
    assert ledger.position(third) == 0
    assert len(ledger) == 2


def test_equal_entries_are_different_requests() -> None:
    ledger = Ledger()
    one, other = Entry(SHAPE, 1, 1, 1, 10, 5), Entry(SHAPE, 1, 1, 1, 10, 5)
    ledger.add(one)
    ledger.add(other)
    ledger.remove(one)
    assert list(ledger) == [other]
