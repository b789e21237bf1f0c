"""A workload run by Locust in one process: when it begins and ends, and the recording of it. Several processes are in
`diffuserve_loadtest.sending.distributed`.

A run that is stopped before its time is recorded with the time that it took.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gevent
import msgspec
from gevent.event import AsyncResult
from locust.stats import CSV_STATS_INTERVAL_SEC

from diffuserve_loadtest.sending.generator import CANNOT_KEEP_UP
from diffuserve_loadtest.sending.lateness import shortfall
from diffuserve_loadtest.sending.load import Load, Share
from diffuserve_loadtest.sending.records import CANCELLED, Record, Recording, write_recording
from diffuserve_loadtest.sending.sender import Sender
from diffuserve_loadtest.sending.target import Target
from diffuserve_loadtest.sending.transports import open_transport
from diffuserve_loadtest.workload.arrivals import Closed
from diffuserve_loadtest.workload.workload import Workload


class Generation:
    """What all of Locust's processes have in common: the books of a run. One process may make several runs, one after the
    other, as people do from the web page."""

    def __init__(self, environment: Any, workload: Workload, recording: Path | None) -> None:
        self._environment = environment
        self._runner: Any = environment.runner
        self._workload = workload
        self._recording = recording
        self._open_books(0.0)
        self._open = False

    def _open_books(self, starts_at: float) -> None:
        """Begins anew."""
        self._starts_at = starts_at
        self._records: list[Record] = []
        self._unsent = 0
        self._sent_for_s = 0.0
        self._open = True

    def _close_books(self, problem: str = "") -> bool:
        """Writes the recording and sets the exit code; False if that has been done.

        Args:
            problem: why not all was sent that was to be, beside what the records say.
        """
        if not self._open:
            return False
        self._open = False
        workload = self._workload
        if 0 < self._sent_for_s < workload.duration_s:  # it was stopped
            workload = msgspec.structs.replace(workload, duration_s=self._sent_for_s)
        recording = Recording(self._starts_at, workload, self._records, self._unsent)
        if self._recording is not None:
            write_recording(recording, self._recording)
        if problem := problem or shortfall(recording):
            print(f"The generator could not keep up: {problem}.", file=sys.stderr)
        self._environment.process_exit_code = CANNOT_KEEP_UP if problem else 0
        return True

    def _leave(self, reports_every_s: float = 0.0) -> None:
        """Ends Locust, or the run if it has a web page."""
        if self._environment.web_ui is not None:
            self._runner.stop()
            return
        if self._environment.parsed_options.csv_prefix:
            # Locust writes these at intervals, and not at the end.
            gevent.sleep(reports_every_s + 2 * CSV_STATS_INTERVAL_SEC)
        self._runner.quit()


class Sending(Generation):
    """A process that sends: all of the load, unless a subclass says otherwise."""

    def __init__(self, environment: Any, workload: Workload, target: Target, recording: Path | None) -> None:
        super().__init__(environment, workload, recording)
        self._protocol = target.protocol
        self._transport = open_transport(target, workload.max_in_flight)
        self._load = AsyncResult()
        environment.events.test_stopping.add_listener(lambda **_: self._stop())
        self._listen()

    def turn(self) -> bool:
        """What one of Locust's users does, again and again until it gets False.

        In a closed loop it sends one request and waits for the answer. In an open loop nobody waits for answers, so that the
        users only stand for the run, which goes on beside them.
        """
        load: Load = self._load.get()
        if isinstance(self._workload.arrivals, Closed):
            return load.send_next()
        load.ended.wait()
        return False

    def _listen(self) -> None:
        self._environment.events.test_start.add_listener(lambda **_: self._begin(Share.of_all(1)[0]))

    def _begin(self, share: Share) -> None:
        self._open_books(share.starts_at)
        load = Load(self._workload, Sender(self._workload, self._transport, self._report), share)
        self._load.set(load)
        gevent.spawn(self._wait_for_the_end, load)

    def _wait_for_the_end(self, load: Load) -> None:
        load.ended.wait()
        if self._finish():
            self._leave()

    def _stop(self) -> None:
        """Locust has been told to stop: by a person, by its --run-time, or by `_leave`, when all is done."""
        if self._open:
            self._load.get().stop()
            self._finish()

    def _finish(self) -> bool:
        """False if that has been done."""
        if not self._open:
            return False
        load: Load = self._load.get()
        self._load = AsyncResult()
        self._unsent, self._sent_for_s = load.unsent, load.sent_for_s
        return self._close_books()

    def _report(self, record: Record, error: Exception | None) -> None:
        self._records.append(record)
        self._environment.events.request.fire(
            request_type=self._protocol,
            # Apart, since how long it took to cancel a request says nothing about those that are answered.
            name=f"{record.kind}, {CANCELLED}" if record.outcome == CANCELLED else record.kind,
            response_time=record.latency_s * 1000,
            response_length=record.size_bytes,
            exception=error,
            context={"outcome": record.outcome},
        )
