"""The pipeline's figures on Triton's metrics endpoint; the table is in diffuserve/stats.py."""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils

from diffuserve.pipeline import Pipeline
from diffuserve.stats import COUNTER, GAUGE, HISTOGRAM, METRICS

_PREFIX = "diffuserve_"


class Metrics:
    """Every call is a round trip to the server, so `update` is called by a thread of its own, at intervals."""

    def __init__(self, model_name: str) -> None:
        kinds = {
            COUNTER: pb_utils.MetricFamily.COUNTER,
            GAUGE: pb_utils.MetricFamily.GAUGE,
            HISTOGRAM: pb_utils.MetricFamily.HISTOGRAM,
        }
        self._families = []  # a family must outlive its metrics
        self._metrics: dict[str, Any] = {}
        self._reported: dict[str, float] = {}
        for metric in METRICS:
            family = pb_utils.MetricFamily(_PREFIX + metric.name, metric.description, kinds[metric.kind])
            buckets = {"buckets": list(metric.buckets)} if metric.kind == HISTOGRAM else {}
            self._families.append(family)
            self._metrics[metric.name] = family.Metric(labels={"model": model_name}, **buckets)

    def update(self, pipeline: Pipeline) -> None:
        """Brings Triton's figures up to date; only what has changed is sent."""
        for name, gauge in pipeline.gauges().items():
            if self._reported.get(name) != gauge:
                self._metrics[name].set(gauge)
                self._reported[name] = gauge
        for metric in METRICS:
            if metric.kind == COUNTER:
                total = pipeline.stats.total(metric.name)
                added = total - self._reported.get(metric.name, 0)
                if added:
                    self._metrics[metric.name].increment(added)
                    self._reported[metric.name] = total
        for name, value in pipeline.stats.collect():
            self._metrics[name].observe(value)
