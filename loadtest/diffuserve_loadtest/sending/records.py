"""What the generator writes down of every request, and the file in which it hands that over."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from diffuserve.errors import DiffuserveError
from diffuserve.files import write_whole
from diffuserve_loadtest.workload.workload import Workload

OK = "ok"
CANCELLED = "cancelled"
"""The workload had it cancelled; it is neither a success nor an error."""
LATE_S = 0.05
"""A request of an open loop that is sent later than this after it was due was late."""


class RequestsFailed(DiffuserveError):
    """Requests were not answered in a run that means something only if all are."""

    code = "requests_failed"


class Record(msgspec.Struct, frozen=True):
    """One request as the generator saw it. Times are seconds since the run's start.

    Attributes:
        due_s: when it was to be sent; in a closed loop, when it was sent.
        sent_s: when it was sent.
        done_s: when its last answer had been read and checked, or it failed.
        kind: what it cost, in words, such as "20 steps, 128 x 128, guided".
        outcome: `OK`, `CANCELLED`, or what went wrong: a code of `diffuserve.errors`, `wrong_image` for an answer that is
            no image of the size asked for, `http_STATUS` where a server gave no code, `connection`, `timeout`,
            `generator_error` for a fault of the generator's.
        unet_rows: UNet rows that it takes in all: steps x images, twice with guidance.
        images: that came, decoded and of the right size.
        size_bytes: of the answer.
        message: the error's first characters.
    """

    due_s: float
    sent_s: float
    done_s: float
    kind: str
    outcome: str
    unet_rows: int
    images: int = 0
    size_bytes: int = 0
    message: str = ""

    @property
    def latency_s(self) -> float:
        """From when it was due, so that a late generator does not flatter the server (no coordinated omission)."""
        return self.done_s - self.due_s

    @property
    def late(self) -> bool:
        return self.sent_s - self.due_s > LATE_S


class Recording(msgspec.Struct, frozen=True):
    """One run of the generator.

    Attributes:
        started_at: seconds since the epoch; what the records' times count from.
        workload: as it was run: rates in requests per second.
        records: in the order in which they ended, those of the warm-up too.
        unsent: requests that were due within the run and not sent, because too many were in flight.
    """

    started_at: float
    workload: Workload
    records: Sequence[Record]
    unsent: int = 0


def write_recording(recording: Recording, path: Path) -> None:
    """Whole or not at all."""
    write_whole(path, msgspec.json.encode(recording))


def read_recording(path: Path) -> Recording:
    """Raises `OSError` or `msgspec.DecodeError`."""
    return msgspec.json.decode(path.read_bytes(), type=Recording)


def counted_of(recording: Recording) -> list[Record]:
    """The requests that were due after the warm-up."""
    return [record for record in recording.records if record.due_s >= recording.workload.warm_up_s]


def all_answered(recording: Recording) -> Sequence[Record]:
    """The records of a run, in the order in which the answers came. Raises `RequestsFailed` if one is not an answer, or is missing."""
    failed = [record for record in recording.records if record.outcome != OK]
    if failed or recording.unsent:
        words = f" The first one: {failed[0].outcome}: {failed[0].message}" if failed else ""
        raise RequestsFailed(
            f"Of {len(recording.records) + recording.unsent} requests {len(failed)} failed and {recording.unsent} were not "
            f"sent.{words}"
        )
    return recording.records
