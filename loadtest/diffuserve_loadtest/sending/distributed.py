"""A workload run by several of Locust's processes.

The master gives each worker its `Share`. Workers send their records along with Locust's own reports, and the rest when they have
ended; then the master ends the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gevent
import msgspec
from gevent.event import Event
from locust.runners import STATE_MISSING, WORKER_REPORT_INTERVAL, MasterRunner, WorkerRunner

from diffuserve_loadtest.sending.generation import Generation, Sending
from diffuserve_loadtest.sending.load import Share
from diffuserve_loadtest.sending.records import Record
from diffuserve_loadtest.sending.target import Target
from diffuserve_loadtest.workload.workload import Workload

_SHARE, _STOP, _ENDED = "diffuserve-share", "diffuserve-stop", "diffuserve-ended"
_LOOK_FOR_LOST_EVERY_S = 1.0
_STOPS_WITHIN_S = 60.0


def open_generation(environment: Any, workload: Workload, target: Target, recording: Path | None) -> Generation:
    """For this process of Locust, whatever its part is.

    Raises:
        InvalidRequest: the target's address does not fit its protocol.
    """
    if isinstance(environment.runner, MasterRunner):
        return Master(environment, workload, recording)
    if isinstance(environment.runner, WorkerRunner):
        return Worker(environment, workload, target, None)
    return Sending(environment, workload, target, recording)


class Worker(Sending):
    """Sends its share, and leaves the books to the master."""

    def _listen(self) -> None:
        self._environment.events.report_to_master.add_listener(lambda client_id, data, **_: data.update(self._give()))
        self._runner.register_message(_SHARE, lambda environment, msg, **_: self._begin(Share(**msg.data)))
        self._runner.register_message(_STOP, lambda environment, msg, **_: self._stop())

    def _give(self) -> dict[str, Any]:
        """Records since the last time."""
        records, self._records = self._records, []
        return {"diffuserve_records": msgspec.to_builtins(records)}

    def _close_books(self, problem: str = "") -> bool:
        self._open = False
        self._runner.send_message(_ENDED, {**self._give(), "unsent": self._unsent, "sent_for_s": self._sent_for_s})
        return False  # the master ends Locust


class Master(Generation):
    """Sends nothing itself."""

    def __init__(self, environment: Any, workload: Workload, recording: Path | None) -> None:
        super().__init__(environment, workload, recording)
        self._sending: set[str] = set()
        self._lost = 0
        self._all_ended = Event()
        events = environment.events
        events.test_start.add_listener(lambda **_: self._begin())
        events.test_stopping.add_listener(lambda **_: self._stop())
        events.worker_report.add_listener(lambda client_id, data, **_: self._take(data))
        self._runner.register_message(_ENDED, lambda environment, msg, **_: self._worker_ended(msg.node_id, msg.data))

    def _begin(self) -> None:
        alive = [client.id for client in self._runner.clients.values() if client.state != STATE_MISSING]
        shares = Share.of_all(len(alive))
        self._open_books(shares[0].starts_at)
        self._sending, self._lost, self._all_ended = set(alive), 0, Event()
        for client_id, share in zip(alive, shares, strict=True):
            self._runner.send_message(_SHARE, msgspec.to_builtins(share), client_id)
        gevent.spawn(self._wait_for_the_end, self._all_ended)

    def _wait_for_the_end(self, all_ended: Event) -> None:
        while not all_ended.wait(_LOOK_FOR_LOST_EVERY_S):
            clients = self._runner.clients
            lost = {name for name in self._sending if name not in clients or clients[name].state == STATE_MISSING}
            self._lost += len(lost)
            self._without(lost)
        if self._finish():
            self._leave(WORKER_REPORT_INTERVAL)

    def _stop(self) -> None:
        """Locust has been told to stop, or has ended."""
        if self._open:
            for client_id in self._sending:
                self._runner.send_message(_STOP, None, client_id)
            self._all_ended.wait(_STOPS_WITHIN_S)
            self._finish()

    def _finish(self) -> bool:
        """False if that has been done."""
        lost = self._lost + len(self._sending)
        return self._close_books(f"{lost} of its processes were lost, with what they had to send" if lost else "")

    def _take(self, data: Mapping[str, Any]) -> None:
        self._records += msgspec.convert(data.get("diffuserve_records", []), list[Record])

    def _worker_ended(self, client_id: str, data: Mapping[str, Any]) -> None:
        self._take(data)
        self._unsent += data["unsent"]
        self._sent_for_s = max(self._sent_for_s, data["sent_for_s"])
        self._without({client_id})

    def _without(self, client_ids: set[str]) -> None:
        self._sending -= client_ids
        if not self._sending:
            self._all_ended.set()
