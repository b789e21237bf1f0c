"""The pipeline's figures through TorchServe's metrics API; the table is in diffuserve/stats.py.

TorchServe takes each figure as a line on the worker's standard output, so they are reported once a batch; the gauges,
which say what goes on now, are left out. It gives every histogram the buckets of Prometheus's client, 0.005 to 10,
whatever is measured.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from diffuserve.pipeline import Pipeline
from diffuserve.stats import COUNTER, HISTOGRAM, METRICS, Metric

_PREFIX = "diffuserve_"
BATCH = Metric("batch_requests", HISTOGRAM, "Requests that TorchServe handed over together.")


class Metrics:
    """Args:
    cache: `context.metrics` of TorchServe.
    model_name: the label of all metrics.
    """

    def __init__(self, cache: Any, model_name: str) -> None:
        from ts.metrics.metric_type_enum import MetricTypes

        kinds = {COUNTER: MetricTypes.COUNTER, HISTOGRAM: MetricTypes.HISTOGRAM}
        self._labels = [model_name]
        self._metrics = {
            metric.name: cache.add_metric_to_cache(
                metric_name=_PREFIX + metric.name,
                unit="seconds" if metric.name.endswith("_seconds") else "count",
                dimension_names=["model"],
                metric_type=kinds[metric.kind],
            )
            for metric in (*METRICS, BATCH)
            if metric.kind in kinds
        }
        self._reported: Counter[str] = Counter()

    def report(self, requests: int, pipeline: Pipeline) -> None:
        """Brings TorchServe's figures up to date after a batch of so many requests; only what has changed is sent."""
        self._report(BATCH.name, requests)
        for metric in METRICS:
            if metric.kind == COUNTER:
                total = pipeline.stats.total(metric.name)
                added = total - self._reported[metric.name]
                if added:
                    self._report(metric.name, added)
                    self._reported[metric.name] = total
        for name, value in pipeline.stats.collect():
            self._report(name, value)

    def _report(self, name: str, value: float) -> None:
        self._metrics[name].add_or_update(value, self._labels)
