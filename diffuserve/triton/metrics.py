"""The in-flight model's figures on Triton's metrics endpoint; see docs/metrics.md."""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils

from diffuserve.pipeline import Pipeline


class Metrics:
    """Copies the pipeline's counts into Triton's. Every call is a round trip to the server, so `update` is called by a
    thread of its own, at intervals."""

    def __init__(self, model_name: str) -> None:
        self._labels = {"model": model_name}
        counter, gauge = pb_utils.MetricFamily.COUNTER, pb_utils.MetricFamily.GAUGE
        self._calls = self._metric("diffuserve_unet_calls", "UNet calls", counter)
        self._rows = self._metric("diffuserve_unet_rows", "UNet rows executed", counter)
        self._shareable = self._metric(
            "diffuserve_unet_rows_shareable",
            "UNet rows that were ready for a call of their shape, within its row budget",
            counter,
        )
        self._active = self._metric("diffuserve_requests_active", "Requests accepted and not yet answered", gauge)
        self._waiting = self._metric(
            "diffuserve_requests_waiting", "Requests accepted whose first step is not done yet", gauge
        )

    def _metric(self, name: str, description: str, kind: Any) -> Any:
        family = pb_utils.MetricFamily(name=name, description=description, kind=kind)
        self._families = [*getattr(self, "_families", []), family]  # a family must outlive its metrics
        return family.Metric(labels=self._labels)

    def update(self, pipeline: Pipeline) -> None:
        """Brings Triton's figures up to date."""
        stats = pipeline.loop.stats
        for metric, total in (
            (self._calls, stats.calls),
            (self._rows, stats.rows),
            (self._shareable, stats.rows_shareable),
        ):
            metric.increment(total - metric.value())
        self._active.set(pipeline.active)
        self._waiting.set(pipeline.waiting)
