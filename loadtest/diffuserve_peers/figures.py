"""What a comparison measures of each contender, and its report."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from diffuserve.trials.similarity import psnr_db
from diffuserve_loadtest.report.report import Plot, Report, Table
from diffuserve_loadtest.report.summary import summarise
from diffuserve_loadtest.sending.records import OK, Recording

SAME_DB = 40.0
"""Images that are at least so alike are one image, drawn by two engines."""


@dataclass
class Figures:
    """One contender's, as they come in.

    Attributes:
        setup_lines: as of `Contender`.
        image: a file, of the request that all contenders draw.
        first_image_s: from each start to the first image.
        saturations_per_s: images per second of each backlog.
        latencies_s: of the requests that were answered, from when they were due, by load, of all rounds.
        errors: requests that got no image.
        peak_bytes: proportional memory of all its processes.
        late: what the generator said when it did not keep up.
    """

    setup_lines: int
    image: bytes = b""
    first_image_s: list[float] = field(default_factory=list)
    saturations_per_s: list[float] = field(default_factory=list)
    latencies_s: dict[float, list[float]] = field(default_factory=dict)
    errors: int = 0
    peak_bytes: int = 0
    late: list[str] = field(default_factory=list)

    @property
    def saturation_per_s(self) -> float:
        return statistics.fmean(self.saturations_per_s)

    def add_backlog(self, recording: Recording) -> None:
        """A backlog, from the moment at which it was sent to the last answer."""
        self._add_errors(recording)
        images = sum(record.images for record in recording.records if record.outcome == OK)
        self.saturations_per_s.append(images / max(record.done_s for record in recording.records))

    def add_load(self, load: float, recording: Recording) -> None:
        self._add_errors(recording)
        answered = [record.latency_s for record in recording.records if record.outcome == OK]
        self.latencies_s.setdefault(load, []).extend(answered)

    def _add_errors(self, recording: Recording) -> None:
        self.errors += recording.unsent + sum(record.outcome != OK for record in recording.records)


def report_on(figures: Mapping[str, Figures], settings: Mapping[str, object]) -> Report:
    """Contenders in the order of their saturation; images are compared with the first contender's.

    Args:
        figures: by contender, complete.
        settings: of the comparison.
    """
    slowest_per_s = min(each.saturations_per_s[0] for each in figures.values())
    ranked = dict(sorted(figures.items(), key=lambda item: -item[1].saturation_per_s))
    alike_db = _alike_db(figures)
    loads = sorted(next(iter(figures.values())).latencies_s)
    header = (
        "server",
        "images/s at saturation",
        *(f"{p} s at {load:.0%}" for load in loads for p in ("p50", "p95")),
        "peak memory MiB",
        "lines of setup",
        "first image s",
        "PSNR dB",
        "errors",
    )
    return Report(
        "peers",
        settings,
        {
            "slowest_saturation_per_s": slowest_per_s,
            "contenders": {name: _as_json(each, alike_db[name]) for name, each in ranked.items()},
        },
        [
            Table(
                f"Loads are shares of the slowest one's first saturation, {slowest_per_s:.3f} images/s",
                header,
                [_row(name, each, loads, alike_db[name]) for name, each in ranked.items()],
            )
        ],
        _remarks(ranked, alike_db),
        {
            f"latency-{load * 100:.0f}": Plot(
                {name: _shares(each.latencies_s[load]) for name, each in ranked.items() if each.latencies_s[load]},
                "latency from when a request was due, s",
                f"share of the requests, at a load of {load:.0%}",
            )
            for load in loads
        },
    )


def _row(name: str, figures: Figures, loads: Sequence[float], alike_db: float) -> tuple[str, ...]:
    rates = ", ".join(f"{rate:.3f}" for rate in figures.saturations_per_s)
    latencies: list[str] = []
    for load in loads:
        if figures.latencies_s[load]:
            latency_s = summarise(figures.latencies_s[load])
            latencies += [f"{latency_s.p50:.2f}", f"{latency_s.p95:.2f}"]
        else:
            latencies += ["none", "none"]
    return (
        name,
        f"{figures.saturation_per_s:.3f} ({rates})",
        *latencies,
        f"{figures.peak_bytes / 2**20:.0f}",
        str(figures.setup_lines),
        f"{statistics.median(figures.first_image_s):.1f}",
        "same" if alike_db == math.inf else f"{alike_db:.0f}",
        str(figures.errors),
    )


def _as_json(figures: Figures, alike_db: float) -> dict[str, object]:
    return {
        "saturation_per_s": figures.saturation_per_s,
        "saturations_per_s": figures.saturations_per_s,
        "latencies_s": {f"{load:g}": latencies_s for load, latencies_s in figures.latencies_s.items()},
        "peak_bytes": figures.peak_bytes,
        "setup_lines": figures.setup_lines,
        "first_image_s": figures.first_image_s,
        "psnr_db": None if alike_db == math.inf else alike_db,
        "errors": figures.errors,
    }


def _alike_db(figures: Mapping[str, Figures]) -> dict[str, float]:
    from PIL import Image

    images = {name: np.asarray(Image.open(io.BytesIO(each.image)).convert("RGB")) for name, each in figures.items()}
    first = next(iter(images.values()))
    return {name: psnr_db(image, first) if image.shape == first.shape else 0.0 for name, image in images.items()}


def _remarks(figures: Mapping[str, Figures], alike_db: Mapping[str, float]) -> list[str]:
    others = [
        f"{name} draws another image (PSNR {db:.0f} dB): its figures are of other work."
        for name, db in alike_db.items()
        if db < SAME_DB
    ]
    return others + [f"{name}: {words}" for name, each in figures.items() for words in each.late]


def _shares(latencies_s: Sequence[float]) -> list[tuple[float, float]]:
    """Of the requests, that took at most so long."""
    return [(latency_s, number / len(latencies_s)) for number, latency_s in enumerate(sorted(latencies_s), 1)]
