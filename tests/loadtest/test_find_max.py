from __future__ import annotations

import pytest

from diffuserve_loadtest.find_max import find_max
from diffuserve_loadtest.report.found import Found, Try


def _search(knee_per_s: float, guess_per_s: float) -> Found:
    """A server that keeps its promise up to a rate."""

    def attempt(rate_per_s: float) -> Try:
        kept = rate_per_s <= knee_per_s
        return Try(rate_per_s, kept, {"p50": 1.0, "p95": 2.0}, rate_per_s if kept else 0.0)

    return find_max(attempt, guess_per_s)


@pytest.mark.parametrize("guess_per_s", [0.13, 0.9, 1.7, 1.71, 20.0])
def test_the_knee_is_found_within_a_twentieth(guess_per_s: float) -> None:
    found = _search(1.7, guess_per_s)
    assert found.rate_per_s is not None
    assert 1.7 / 1.05 <= found.rate_per_s <= 1.7
    assert len(found.tries) <= 12
    assert found.words == f"{found.rate_per_s:.3g} requests/s kept the service level."


def test_a_rate_that_failed_is_never_the_answer() -> None:
    found = _search(1.7, 3.0)
    assert next(each for each in found.tries if each.rate_per_s == found.rate_per_s).kept


def test_a_server_that_never_keeps_it() -> None:
    found = _search(0.0, 1.0)
    assert found.rate_per_s is None
    assert len(found.tries) == 7
    assert found.words == "No rate kept the service level, not even 0.0156 requests/s."


def test_a_server_without_a_knee_is_not_searched_forever() -> None:
    found = _search(1e9, 1.0)
    assert found.rate_per_s == 64.0
    assert found.words == "At least 64 requests/s kept the service level."
