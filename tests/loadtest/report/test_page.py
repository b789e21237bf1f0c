from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from diffuserve_loadtest.report.charts import batch_sizes, charts_of
from diffuserve_loadtest.report.found import Found, Try
from diffuserve_loadtest.report.page import html, publish_run
from diffuserve_loadtest.report.run import Run, read_run, write_run
from diffuserve_loadtest.workload.arrivals import Poisson
from tests.loadtest.synthetic import record, run, sample

pytest.importorskip("matplotlib")

_VOID = ("meta", "br", "img", "link", "input", "hr")
_FETCHING = ("src", "href", "xlink:href", "data", "poster", "srcset", "action")


class _Page(HTMLParser):
    """What stands where, and what a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in _VOID:
            self.open.append(tag)
        self._look(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._look(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def _look(self, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [
            value or "" for name, value in attrs if name in _FETCHING and not (value or "").startswith("#")
        ]


def made_up() -> Run:
    records = [record(float(due_s), 1.0 + due_s / 50) for due_s in range(100)]
    refused = [record(40.5, 0.01, "queue_full", message="<script>alert(1)</script> is full")]
    samples = [
        sample(at_s, unet_calls=float(at_s), unet_rows=4.0 * at_s, requests_waiting=2.0, requests_running=1.0)
        for at_s in range(0, 115)
    ]
    return run([*records, *refused], samples, "p95<2s,errors<5%")


@pytest.fixture(scope="module")
def text() -> str:
    """The page of `made_up`."""
    return html(made_up())


def test_the_page_needs_nothing_else(text: str) -> None:
    page = _Page(text)
    assert page.open == []
    assert page.fetched == []
    assert "script" not in page.tags
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", text)
    assert page.tags.count("svg") == 7


def test_the_page_says_what_the_run_was(text: str) -> None:
    made = made_up()
    assert "&lt;script&gt;alert(1)&lt;/script&gt; is full" in text
    for chart in ("Latency over time", "Latency distribution", "Throughput", "Requests waiting and running"):
        assert f"<figcaption>{chart}</figcaption>" in text
    for chart in ("UNet batch sizes", "Errors by kind", "Resident memory"):
        assert f"<figcaption>{chart}</figcaption>" in text
    assert '<td class="broken">broken</td>' in text
    assert '<td class="kept">kept</td>' in text
    assert made.machine["processor"] in text
    assert "could not keep up" not in text
    assert "could not keep up" in html(msgspec.structs.replace(made, kept_up=False))


def test_batch_sizes_in_words() -> None:
    assert batch_sizes(made_up()) == {"1": 0.0, "2": 0.0, "3-4": 114.0}


def test_latency_by_rate_of_a_ramp_and_of_a_search(text: str) -> None:
    title, steady = "Latency against offered rate", made_up()
    assert title not in text
    workload = msgspec.structs.replace(steady.recording.workload, arrivals=Poisson(rate_per_s=(0.2, 2.0)))
    ramp = msgspec.structs.replace(steady, recording=msgspec.structs.replace(steady.recording, workload=workload))
    assert title in charts_of(ramp)
    found = Found(1.0, [Try(1.0, True, {"p50": 1.0, "p95": 2.0, "p99": 3.0}, 1.0), Try(2.0, False, {}, 0.0)])
    searched = html(steady, found)
    assert title in searched
    assert "1 requests/s kept the service level." in searched


def test_a_run_in_which_nothing_was_answered() -> None:
    page = _Page(html(run([record(20, 1.0, "stage_failed")], slo="p95<2s")))
    assert page.open == []


def test_the_same_run_gives_the_same_page(text: str) -> None:
    assert html(made_up()) == text


def test_json_holds_the_whole_run(tmp_path: Path) -> None:
    made = made_up()
    write_run(made, tmp_path / "run.json")
    assert msgspec.to_builtins(read_run(tmp_path / "run.json")) == msgspec.to_builtins(made)
    later = msgspec.structs.replace(made, format_version=99)
    write_run(later, tmp_path / "later.json")
    with pytest.raises(msgspec.DecodeError, match="has the format 99"):
        read_run(tmp_path / "later.json")


def test_a_run_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish_run(made_up(), tmp_path / "results", Found(None, [Try(0.5, False, {}, 0.0)]))
    printed = capsys.readouterr().out
    assert re.search(r"p95<2s +2\.\d+ s: BROKEN\nerrors<5% +1\.10%: kept", printed)
    assert re.search(r"queue_full +1: <script>", printed)
    assert "not even 0.5 requests/s" in printed
    assert {path.name for path in (tmp_path / "results").iterdir()} == {
        "made-up.html",
        "made-up.json",
        "made-up-tries.json",
    }
