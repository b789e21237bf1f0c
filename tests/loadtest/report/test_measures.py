from __future__ import annotations

import pytest

from diffuserve_loadtest.report.measures import Memory, NothingMeasured, latencies, measure, values_for
from diffuserve_loadtest.report.slo import Slo, slo_from_text
from diffuserve_loadtest.run_workload import rows_per_s
from diffuserve_loadtest.sending.records import CANCELLED
from tests.loadtest.synthetic import record, recording, run, sample

NO_SLO = Slo()


def test_latency_counts_from_when_a_request_was_due() -> None:
    measures = measure(recording([record(20, 3.0, late_s=2.5)]), [], NO_SLO)
    assert measures.latency_s["p50"] == 3.0
    assert measures.late == 1.0


def test_the_distribution_of_latencies() -> None:
    distribution = latencies([float(value) for value in range(101)])
    assert distribution == pytest.approx(
        {"mean": 50, "p50": 50, "p90": 90, "p95": 95, "p99": 99, "p99.9": 99.9, "max": 100}
    )
    assert latencies([]) == {}


def test_the_warm_up_is_left_out() -> None:
    slow = [record(due_s, 9.0) for due_s in range(10)]
    fast = [record(due_s, 1.0) for due_s in range(10, 60)]
    measures = measure(recording([*slow, *fast]), [], NO_SLO)
    assert measures.outcomes == {"ok": 50}
    assert measures.latency_s["max"] == 1.0
    assert measures.offered_per_s == 0.5


def test_a_rate_counts_what_was_answered_in_the_window() -> None:
    early = record(5, 10)  # due in the warm-up, answered after it
    within = [record(due_s, 1.0) for due_s in range(20, 60)]
    after = record(105, 10)  # answered when no more was sent
    measures = measure(recording([early, *within, after]), [], NO_SLO)
    assert measures.throughput_per_s == measures.images_per_s == 41 / 100


def test_goodput_is_what_came_within_the_bound() -> None:
    slo = slo_from_text("p95<3s")
    fast, slow = [record(20 + n, 1.0) for n in range(30)], [record(20 + n, 3.5) for n in range(10)]
    measures = measure(recording([*fast, *slow]), [], slo)
    assert measures.throughput_per_s == 0.4
    assert measures.goodput_per_s == 0.3


def test_failures_by_kind() -> None:
    records = [
        *(record(20, 1.0) for _ in range(6)),
        *(record(20, 0.02 * (n + 1), "queue_full") for n in range(3)),
        record(20, 1.0, "stage_failed"),
        *(record(20, 1.0, CANCELLED) for _ in range(5)),
    ]
    measures = measure(recording(records, unsent=2), [], NO_SLO)
    assert measures.outcomes == {"ok": 6, "cancelled": 5, "queue_full": 3, "stage_failed": 1}
    assert measures.errors == 0.4  # of ten that were not cancelled
    assert measures.refused == 0.3
    assert measures.unsent == 2
    assert measures.refusal_s is not None
    assert measures.refusal_s["p50"] == pytest.approx(0.04)


def test_nothing_to_measure() -> None:
    with pytest.raises(NothingMeasured, match=r"No request was due in the 100 s after the warm-up.*--duration"):
        measure(recording([record(3, 1.0)]), [], NO_SLO)


def test_rows_of_the_server() -> None:
    samples = [
        sample(-1, unet_calls=100.0, unet_rows=500.0, unet_rows_shareable=500.0),
        sample(5),  # it did not answer
        sample(111, unet_calls=110.0, unet_rows=540.0, unet_rows_shareable=550.0),
    ]
    measures = measure(recording([record(20, 1.0), record(21, 1.0, CANCELLED)]), samples, NO_SLO)
    assert measures.rows_a_call == 4.0
    assert measures.shared_rows == 0.8
    assert measures.useful_rows == 0.5  # 20 of one answered request, of 40


def test_a_counter_that_is_not_there_yet_is_0() -> None:
    samples = [sample(-1), *(sample(at_s, unet_calls=at_s / 10, unet_rows=4 * at_s / 10) for at_s in (50.0, 111.0))]
    measures = measure(recording([record(20, 1.0)]), samples, NO_SLO)
    assert measures.rows_a_call == pytest.approx(4.0)
    assert measures.useful_rows == pytest.approx(20 / 44.4)


def test_a_server_that_was_started_anew_has_no_rows() -> None:
    before, after = [sample(at_s, unet_calls=calls, unet_rows=calls) for at_s, calls in ((-1, 100.0), (111, 10.0))]
    measures = measure(recording([record(20, 1.0)]), [before, after], NO_SLO)
    assert measures.rows_a_call is measures.shared_rows is measures.useful_rows is None


def test_memory_is_compared_by_quarters() -> None:
    sizes = [100] * 25 + [900] * 50 + [110] * 25
    warm_up = [sample(at_s, 1) for at_s in range(10)]
    samples = [*warm_up, *(sample(10 + at_s, size, open_files=7 + at_s) for at_s, size in enumerate(sizes))]
    measures = measure(recording([record(20, 1.0)]), samples, NO_SLO)
    assert measures.memory == {"unet": Memory(100.0, 110.0, 900)}
    assert measures.memory["unet"].growth == pytest.approx(0.1)
    assert measures.open_files == {"unet": (7, 106)}


def test_shared_memory_that_is_left_over() -> None:
    measures = measure(
        recording([record(20, 1.0)]), [sample(-1, files=3), sample(50, files=9), sample(111, files=4)], NO_SLO
    )
    assert measures.shared_memory_files == (3, 4)


def test_values_of_any_percentile() -> None:
    made = recording([record(20, float(value)) for value in range(1, 102)])
    slo = slo_from_text("p75<1s,p99.5<1s,errors<1%")
    values = values_for(slo, measure(made, [], slo), made)
    assert values["p75"] == 76.0
    assert values["p99.5"] == 100.5
    assert values["errors"] == 0.0


@pytest.mark.parametrize("term", ["p95<1s", "p75<1s", "mean<1s", "max<1s"])
def test_no_latency_is_kept_where_nothing_was_answered(term: str) -> None:
    made = run([record(20, 1.0, "stage_failed")], slo=term)
    assert [verdict.words for verdict in made.verdicts] == ["nothing was answered"]
    assert not made.slo_kept


def test_capacity_in_rows_from_a_counter_that_grows_in_bunches() -> None:
    made = recording([record(20, 1.0)], duration_s=40.0)
    bunches = [sample(at_s, unet_rows=60.0 * (at_s // 6)) for at_s in range(0, 45)]
    assert rows_per_s(bunches, made) == 10.0
    assert rows_per_s(bunches[:12], made) is None
    assert rows_per_s([sample(at_s) for at_s in range(0, 45)], made) is None
