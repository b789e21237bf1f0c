"""What a comparison makes of recordings."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from diffuserve_loadtest.sending.records import OK, Record, Recording
from diffuserve_loadtest.workload.arrivals import Poisson
from diffuserve_loadtest.workload.workload import Workload
from diffuserve_peers.figures import Figures, report_on

WORKLOAD = Workload("", Poisson(rate_per_s=1.0))


def png(level: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(stream, "png")
    return stream.getvalue()


def record(due_s: float, done_s: float, outcome: str = OK) -> Record:
    return Record(due_s, due_s, done_s, "20 steps", outcome, 40, images=int(outcome == OK))


def figures(*, level: int = 100, rate_per_s: float = 1.0, latencies_s: tuple[float, ...] = (1.0, 3.0)) -> Figures:
    mine = Figures(setup_lines=7, image=png(level), first_image_s=[4.0, 6.0, 5.0], peak_bytes=3 << 20)
    mine.add_backlog(Recording(0.0, WORKLOAD, [record(0.0, 2 / rate_per_s), record(0.0, 1 / rate_per_s)]))
    for load in (0.5, 0.8):
        mine.add_load(load, Recording(0.0, WORKLOAD, [record(5.0, 5.0 + latency_s) for latency_s in latencies_s]))
    return mine


def test_a_backlog_is_timed_to_its_last_answer() -> None:
    mine = Figures(setup_lines=1)
    mine.add_backlog(Recording(0.0, WORKLOAD, [record(0.0, 4.0), record(0.0, 8.0), record(0.0, 2.0, "http_500")]))
    mine.add_backlog(Recording(0.0, WORKLOAD, [record(0.0, 1.0)], unsent=2))
    assert mine.saturations_per_s == [0.25, 1.0]
    assert mine.saturation_per_s == 0.625
    assert mine.errors == 3


def test_latencies_of_all_rounds_count_from_when_requests_were_due() -> None:
    mine = figures(latencies_s=(1.0, 3.0))
    mine.add_load(0.5, Recording(0.0, WORKLOAD, [record(7.0, 12.0), record(8.0, 9.0, "timeout")]))
    assert mine.latencies_s == {0.5: [1.0, 3.0, 5.0], 0.8: [1.0, 3.0]}
    assert mine.errors == 1


def test_the_table_has_the_fastest_first_and_every_figure() -> None:
    ours, other = figures(rate_per_s=10.5), figures(rate_per_s=9.5, level=101)
    report = report_on({"other": other, "ours": ours}, {})
    [table] = report.tables
    assert [dict(zip(table.header, row, strict=True)) for row in table.rows] == [
        {
            "server": name,
            "images/s at saturation": f"{rate} ({rate})",
            "p50 s at 50%": "2.00",
            "p95 s at 50%": "2.90",
            "p50 s at 80%": "2.00",
            "p95 s at 80%": "2.90",
            "peak memory MiB": "3",
            "lines of setup": "7",
            "first image s": "5.0",
            "PSNR dB": psnr,
            "errors": "0",
        }
        for name, rate, psnr in (("ours", "10.500", "48"), ("other", "9.500", "same"))
    ]
    assert report.measured["slowest_saturation_per_s"] == 9.5
    assert report.remarks == []
    assert report.plots["latency-80"].lines["ours"] == [(1.0, 0.5), (3.0, 1.0)]


def test_another_image_and_a_late_generator_are_remarked() -> None:
    mine = figures(level=200)
    mine.late.append("the generator sent 3 of 4 requests late.")
    report = report_on({"first": figures(), "mine": mine}, {})
    assert report.remarks == [
        "mine draws another image (PSNR 8 dB): its figures are of other work.",
        "mine: the generator sent 3 of 4 requests late.",
    ]


def test_a_contender_that_answers_nothing_is_in_the_table() -> None:
    report = report_on({"dead": figures(latencies_s=()), "ours": figures()}, {})
    assert [row[2:6] for row in report.tables[0].rows if row[0] == "dead"] == [("none",) * 4]
    assert list(report.plots["latency-50"].lines) == ["ours"]


@pytest.mark.parametrize("level", [99, 101])
def test_one_level_apart_is_the_same_image(level: int) -> None:
    assert report_on({"first": figures(), "mine": figures(level=level)}, {}).remarks == []
