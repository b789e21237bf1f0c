"""A workload run by Locust, in one process or in several: who sends what, when it has ended, and the one recording of it.

With several processes the master gives each worker its `Share`, workers send their records along with Locust's own reports,
and the master ends the run when all workers have.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gevent
import msgspec
from gevent.event import AsyncResult
from locust.runners import MasterRunner, WorkerRunner
from locust.stats import CSV_STATS_INTERVAL_SEC

from diffuserve_loadtest.generator import CANNOT_KEEP_UP
from diffuserve_loadtest.lateness import shortfall
from diffuserve_loadtest.load import Load, Share
from diffuserve_loadtest.records import Record, Recording, write_recording
from diffuserve_loadtest.sender import Sender
from diffuserve_loadtest.target import Target
from diffuserve_loadtest.transports import open_transport
from diffuserve_loadtest.workload import Closed, Workload

_SHARE, _ENDED = "diffuserve-share", "diffuserve-ended"


class Generation:
    """One for each process of Locust, kept as `environment.generation`."""

    def __init__(self, environment: Any, workload: Workload, target: Target, recording: Path | None) -> None:
        self._environment = environment
        self._runner: Any = environment.runner
        self._workload = workload
        self._target = target
        self._recording = recording
        self._records: list[Record] = []
        self._unsent = 0
        self._ended_workers = 0
        self._starts_at = 0.0
        self._load = AsyncResult()
        self._listen()

    @property
    def closed(self) -> bool:
        return isinstance(self._workload.arrivals, Closed)

    def turn(self, user: Any) -> bool:
        """What one of Locust's users does, again and again until it gets False.

        In a closed loop it sends one request and waits for the answer. In an open loop nobody waits for answers, so that the
        users only stand for the run, which goes on beside them.
        """
        load: Load = self._load.get()
        if self.closed:
            return load.send_next()
        load.ended.wait()
        return False

    def _listen(self) -> None:
        events, runner = self._environment.events, self._runner
        if isinstance(runner, MasterRunner):
            events.test_start.add_listener(lambda **_: self._share_out())
            events.worker_report.add_listener(lambda client_id, data, **_: self._take(data))
            runner.register_message(_ENDED, lambda environment, msg, **_: self._worker_ended(msg.data))
        elif isinstance(runner, WorkerRunner):
            events.report_to_master.add_listener(lambda client_id, data, **_: data.update(self._give()))
            runner.register_message(_SHARE, lambda environment, msg, **_: self._begin(Share(**msg.data)))
        else:
            events.test_start.add_listener(lambda **_: self._begin(Share.of_all(1)[0]))

    def _share_out(self) -> None:
        """The master's part of a start."""
        self._forget()
        workers = [client.id for client in self._runner.clients.values()]
        for client_id, share in zip(workers, Share.of_all(len(workers)), strict=True):
            self._starts_at = share.starts_at
            self._runner.send_message(_SHARE, msgspec.to_builtins(share), client_id)

    def _begin(self, share: Share) -> None:
        """A sending process's part of a start."""
        self._forget()
        self._starts_at = share.starts_at
        transport = open_transport(self._target, self._workload.max_in_flight)
        load = Load(self._workload, Sender(self._workload, transport, self._report), share)
        self._load.set(load)
        gevent.spawn(self._run, load)

    def _forget(self) -> None:
        """What an earlier run left, where one process makes several, as people do from the web page."""
        self._records, self._unsent, self._ended_workers = [], 0, 0
        self._load = AsyncResult()

    def _run(self, load: Load) -> None:
        if self.closed:
            load.end_closed_loop()
        else:
            load.run_open_loop()
        self._unsent = load.unsent
        if isinstance(self._runner, WorkerRunner):
            self._runner.send_message(_ENDED, {**self._give(), "unsent": load.unsent})
        else:
            self._end()

    def _report(self, record: Record, error: Exception | None) -> None:
        self._records.append(record)
        self._environment.events.request.fire(
            request_type=self._target.protocol,
            name=record.kind,
            response_time=record.latency_s * 1000,
            response_length=record.size_bytes,
            exception=error,
            context={"outcome": record.outcome},
        )

    def _give(self) -> dict[str, Any]:
        """A worker's records since the last time."""
        records, self._records = self._records, []
        return {"diffuserve_records": msgspec.to_builtins(records)}

    def _take(self, data: Mapping[str, Any]) -> None:
        self._records += msgspec.convert(data.get("diffuserve_records", []), list[Record])

    def _worker_ended(self, data: Mapping[str, Any]) -> None:
        self._take(data)
        self._unsent += data["unsent"]
        self._ended_workers += 1
        if self._ended_workers == len(self._runner.clients):
            gevent.spawn(self._end)

    def _end(self) -> None:
        """In the process that has all records."""
        recording = Recording(self._starts_at, self._workload, self._records, self._unsent)
        if self._recording is not None:
            write_recording(recording, self._recording)
        if problem := shortfall(recording):
            print(f"The generator could not keep up: {problem}.", file=sys.stderr)
            self._environment.process_exit_code = CANNOT_KEEP_UP
        else:
            self._environment.process_exit_code = 0
        if self._environment.web_ui is None:
            if self._environment.parsed_options.csv_prefix:
                gevent.sleep(2 * CSV_STATS_INTERVAL_SEC)  # Locust writes these at intervals, and not at the end
            self._runner.quit()
        else:
            self._runner.stop()
