from __future__ import annotations

from pathlib import Path

from diffuserve.stats import HISTOGRAM, METRICS, Metric, Stats

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


def row(metric: Metric) -> str:
    return f"| `diffuserve_{metric.name}` | {metric.kind} | {metric.description} |"


def test_every_metric_is_documented() -> None:
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| `diffuserve_")]
    assert rows == [row(metric) for metric in METRICS]


def test_histograms_have_rising_buckets_and_names_are_unique() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert bool(metric.buckets) == (metric.kind == HISTOGRAM)
        assert list(metric.buckets) == sorted(set(metric.buckets))


def test_observations_are_collected_once_and_bounded() -> None:
    stats = Stats(keep=3)
    for value in range(5):
        stats.observe("queue_seconds", value)
    stats.count("images", 2)
    stats.count("images")
    assert stats.total("images") == 3
    assert stats.collect() == [("queue_seconds", 2), ("queue_seconds", 3), ("queue_seconds", 4)]
    assert stats.collect() == []
