from __future__ import annotations

import pytest

from diffuserve.batching.costs import CallCosts


def test_interpolates_between_what_was_measured() -> None:
    costs = CallCosts({1: 1.0, 4: 2.5, 8: 4.0})
    assert [costs.seconds(rows) for rows in (1, 2, 4, 6, 8, 16)] == pytest.approx([1.0, 1.5, 2.5, 3.25, 4.0, 8.0])


def test_takes_the_batch_with_most_rows_a_second() -> None:
    costs = CallCosts({1: 1.0, 8: 2.0, 9: 4.0, 16: 4.5})  # a ninth row costs as much as eight
    assert costs.best([2, 4, 8, 9, 10]) == 8
    assert costs.best([2, 4, 8, 9, 16]) == 8
    assert costs.best([9]) == 9


def test_within_the_noise_more_rows_are_better() -> None:
    assert CallCosts({8: 0.8, 16: 1.62}).best([8, 16]) == 16


def test_without_measurements_the_largest_batch_is_taken() -> None:
    assert CallCosts({}).best([1, 5, 32]) == 32
