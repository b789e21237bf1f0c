"""Sends one request of a workload, judges the answer and writes down what became of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import gevent

from diffuserve.errors import DiffuserveError
from diffuserve_loadtest.sending.check import WrongImage, check_images
from diffuserve_loadtest.sending.records import CANCELLED, OK, Record
from diffuserve_loadtest.sending.transport import Answer, Transport, TransportFailed
from diffuserve_loadtest.workload.plan import PlannedRequest, plan
from diffuserve_loadtest.workload.workload import Workload

_MESSAGE_CHARACTERS = 300


class _PatienceOver(gevent.Timeout):  # type: ignore[misc]
    """No answer for `patience_s`."""


class _Cancel(gevent.Timeout):  # type: ignore[misc]
    """The workload has the request cancelled."""


class Sender:
    """Requests by number. `report` gets each record, with the error that ended it, if any."""

    def __init__(
        self, workload: Workload, transport: Transport, report: Callable[[Record, Exception | None], Any]
    ) -> None:
        self._workload = workload
        self._transport = transport
        self._report = report
        self._default_size: tuple[int, int] | None = None

    def send(self, number: int, started_s: float, due_s: float | None) -> None:
        """Waits for the answer, which is what takes time; it raises nothing.

        Args:
            number: of the request.
            started_s: the run's start on the monotonic clock.
            due_s: seconds after the start when it was to be sent; None in a closed loop.
        """
        request = plan(self._workload, number)
        sent_s = time.perf_counter() - started_s
        outcome, answer, error = self._outcome(request)
        done_s = time.perf_counter() - started_s
        record = Record(
            sent_s if due_s is None else due_s,
            sent_s,
            done_s,
            request.kind,
            outcome,
            request.unet_rows,
            images=len(answer.files) if outcome == OK else 0,
            size_bytes=answer.size_bytes,
            message=str(error)[:_MESSAGE_CHARACTERS] if error else "",
        )
        self._report(record, error)

    def _outcome(self, request: PlannedRequest) -> tuple[str, Answer, Exception | None]:
        answer = Answer([], 0)
        try:
            with _PatienceOver(self._workload.patience_s), _Cancel(request.cancel_after_s):
                answer = self._transport.send(request)
            size = check_images(request, answer.files, self._default_size)
            if request.size == (None, None):
                self._default_size = size
        except _Cancel:
            return CANCELLED, answer, None
        except _PatienceOver:
            return "timeout", answer, TimeoutError(f"no answer for {self._workload.patience_s} s")
        except WrongImage as error:
            return "wrong_image", answer, error
        except DiffuserveError as error:
            return error.code, answer, error
        except TransportFailed as error:
            return error.outcome, answer, error
        except Exception as error:  # a fault of ours, which must not look as if nothing had been sent
            return "generator_error", answer, error
        return OK, answer, None
