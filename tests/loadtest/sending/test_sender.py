"""Every request that is sent gets a record, whatever comes of it."""

from __future__ import annotations

import time

import pytest

from diffuserve.errors import QueueFull
from diffuserve_loadtest.sending.records import Record
from diffuserve_loadtest.sending.sender import Sender
from diffuserve_loadtest.sending.transport import Answer, TransportFailed
from diffuserve_loadtest.workload.arrivals import Closed
from diffuserve_loadtest.workload.plan import PlannedRequest
from diffuserve_loadtest.workload.workload import Requests, Workload


class Raises:
    """A transport at which every request fails."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def send(self, request: PlannedRequest) -> Answer:
        raise self._error


class Answers:
    """A transport that answers with these files."""

    def __init__(self, *files: bytes) -> None:
        self._files = files

    def send(self, request: PlannedRequest) -> Answer:
        return Answer(list(self._files), sum(map(len, self._files)))


@pytest.mark.parametrize(
    ("transport", "outcome"),
    [
        (Raises(QueueFull("much waits")), "queue_full"),
        (Raises(TransportFailed("http_502", "bad gateway")), "http_502"),
        (Raises(ZeroDivisionError("a mistake of ours")), "generator_error"),
        (Answers(), "wrong_image"),
        (Answers(b"\x89PNG\r\n\x1a\n no more"), "wrong_image"),
    ],
)
def test_a_failure_is_a_record(transport: Raises | Answers, outcome: str) -> None:
    records: list[Record] = []
    workload = Workload("A test.", Closed(1), (Requests(prompt="a secret wish", steps=3),))
    sender = Sender(workload, transport, lambda record, error: records.append(record))
    sender.send(0, time.perf_counter() - 2.0, 1.5)
    [record] = records
    assert record.outcome == outcome
    assert record.message
    assert "secret" not in str(record)
    assert record.images == 0
    assert (record.due_s, record.kind) == (1.5, "3 steps, guided")
    assert 2.0 <= record.sent_s <= record.done_s
