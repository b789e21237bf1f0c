"""What is counted and timed, once for every server: the table of metrics and where the pipeline and the loop note them.

The core only notes; a server turns the notes into its own metrics (Triton: diffuserve/triton/metrics.py). docs/metrics.md
is made from this table.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True)
class Metric:
    """`name` without the prefix; the unit is its last word, as Prometheus asks. `buckets` are upper bounds."""

    name: str
    kind: str
    description: str
    buckets: tuple[float, ...] = ()


METRICS = (
    Metric("requests_waiting", GAUGE, "Requests accepted whose first step is not done yet."),
    Metric("requests_running", GAUGE, "Requests accepted, past their first step and not yet answered."),
    Metric(
        "rows_waiting", GAUGE, "UNet rows per step that the waiting requests will take: images, twice with guidance."
    ),
    Metric("rows_running", GAUGE, "UNet rows per step that the running requests take."),
    Metric("requests_completed", COUNTER, "Requests answered with their images."),
    Metric("requests_failed", COUNTER, "Requests that an engine or the server failed."),
    Metric("requests_cancelled", COUNTER, "Requests whose client cancelled or went away."),
    Metric("requests_expired", COUNTER, "Requests given up because their timeout_ms ran out."),
    Metric("requests_refused", COUNTER, "Requests refused: queue full, not to be finished in time, or draining."),
    Metric("images", COUNTER, "Images finished."),
    Metric("images_withheld", COUNTER, "Of these, images that the safety checker withheld."),
    Metric(
        "images_not_finite",
        COUNTER,
        "Images that the VAE decoder made of values that are not finite; their requests failed.",
    ),
    Metric("unet_calls", COUNTER, "UNet calls; its rate is steps per second."),
    Metric("unet_rows", COUNTER, "UNet rows executed."),
    Metric(
        "unet_rows_shareable",
        COUNTER,
        "UNet rows that were ready for a call of their shape, at most the row budget: unet_rows over this is the share "
        "of rows that could have shared a call and did.",
    ),
    Metric("text_cache_hits", COUNTER, "Prompts whose embedding was there already."),
    Metric("text_cache_misses", COUNTER, "Prompts that the text encoder had to encode."),
    Metric("unet_call_rows", HISTOGRAM, "Rows of a UNet call.", _ROWS),
    Metric("unet_call_seconds", HISTOGRAM, "Time of a UNet call.", _SECONDS),
    Metric("queue_seconds", HISTOGRAM, "From a request's arrival to its admission to the batch.", _SECONDS),
    Metric("first_step_seconds", HISTOGRAM, "From a request's arrival to its first step done.", _SECONDS),
    Metric("request_seconds", HISTOGRAM, "From a request's arrival to its images.", _SECONDS),
    Metric("image_seconds", HISTOGRAM, "The same, divided by the request's number of images.", _SECONDS),
)


class Stats:
    """Counts since the start, and observations until somebody collects them. Written on the event loop, read by any
    thread.

    Args:
        keep: observations kept when nobody collects them; older ones are dropped.
    """

    def __init__(self, keep: int = 10_000) -> None:
        self._totals: Counter[str] = Counter()
        self._observations: deque[tuple[str, float]] = deque(maxlen=keep)

    def count(self, name: str, amount: int = 1) -> None:
        """Adds to a counter."""
        self._totals[name] += amount

    def observe(self, name: str, value: float) -> None:
        """Notes a value for a histogram."""
        self._observations.append((name, value))

    def total(self, name: str) -> int:
        """A counter's value."""
        return self._totals[name]

    def collect(self) -> list[tuple[str, float]]:
        """Takes the observations noted since the last call, oldest first."""
        taken = []
        while self._observations:
            taken.append(self._observations.popleft())
        return taken
