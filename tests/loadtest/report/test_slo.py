from __future__ import annotations

import pytest

from diffuserve_loadtest.report.slo import SloError, slo_from_text

VALUES = {"p95": 2.0, "mean": 1.0, "errors": 0.0, "refused": 0.02, "late": 0.0, "goodput": 1.6, "throughput": 2.0}


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        ("p95<3s", 3.0),
        ("p99.9 < 250ms", 0.25),
        ("errors<0.1%", 0.001),
        ("goodput>1.5/s", 1.5),
        ("max<2.5s", 2.5),
        ("p50<3 s", 3.0),
    ],
)
def test_a_term(text: str, bound: float) -> None:
    [term] = slo_from_text(text).terms
    assert term.bound == pytest.approx(bound)
    assert term.text == text


def test_terms_are_judged_one_by_one() -> None:
    verdicts = slo_from_text("p95<3s, mean<500ms, errors<0.1%,refused<1%, goodput>1.5/s, throughput>3/s").judge(VALUES)
    assert [verdict.kept for verdict in verdicts] == [True, False, True, False, True, False]
    assert [verdict.words for verdict in verdicts] == ["2 s", "1 s", "0.00%", "2.00%", "1.6/s", "2/s"]


def test_a_bound_itself_is_not_kept() -> None:
    assert [verdict.kept for verdict in slo_from_text("p95<2s,p95>2s").judge(VALUES)] == [False, False]


def test_nothing_answered_keeps_no_latency() -> None:
    [verdict] = slo_from_text("p95<3s").judge({"p95": None})
    assert not verdict.kept
    assert verdict.words == "nothing was answered"


def test_goodput_counts_against_the_loosest_latency() -> None:
    assert slo_from_text("p50<1s,p99<3s,errors<1%").latency_bound_s == 3.0
    assert slo_from_text("errors<1%").latency_bound_s is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("p95", "'p95' is not a term of an SLO; terms are like p95<3s"),
        ("p95<", "not a term"),
        ("p95=3s", "not a term"),
        ("p95<-3s", "not a term"),
        ("p95<3", "has the unit ''; p95 is in s or ms"),
        ("p95<3%", "has the unit '%'; p95 is in s or ms"),
        ("errors<3s", "errors is in %"),
        ("goodput>1%", "goodput is in /s"),
        ("speed>3/s", "measures 'speed'; there are p50 .. p99.9, mean, max"),
    ],
)
def test_what_says_nothing_is_refused(text: str, message: str) -> None:
    with pytest.raises(SloError) as raised:
        slo_from_text(f"errors<1%,{text}")
    assert message in str(raised.value)
