"""The handler: one batch of TorchServe's is a few more requests to the in-flight loop.

TorchServe calls `handle` in the worker's only thread and sends nothing to the worker until it returns, so the requests of
one batch share UNet calls among themselves, and the next batch starts when the longest has ended. The loop runs in a
thread of its own; its events are taken here, in order, so that nothing else writes to the connection to TorchServe.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from diffuserve.bundle.manifest import read_manifest
from diffuserve.description import Description, describe
from diffuserve.engines.local_stages import LoadEngines
from diffuserve.errors import BundleError, DiffuserveError, InvalidRequest, StageFailed, to_wire
from diffuserve.events import Completed, Event
from diffuserve.http_answers import (
    Answer,
    answer_from_completed,
    answer_from_description,
    answer_from_error,
    json_from_event,
)
from diffuserve.local_pipeline import LocalPipeline
from diffuserve.serving.lifecycle import BusySign, DrainRequest
from diffuserve.torchserve.configuration import options_from_config
from diffuserve_handlers.metrics import Metrics
from diffuserve_handlers.requests import Received, received_from_data

log = logging.getLogger(__name__)

Outcome = Completed | Description | DiffuserveError


class TextToImageHandler:
    """What TorchServe asks of a handler. A worker has one, and calls it from one thread.

    `load_engines`: makes other engines than those that the bundle's manifest names; set by an archive's entry point.
    """

    load_engines: LoadEngines | None = None

    def initialize(self, context: Any) -> None:
        """Loads the bundle in the archive, or the one that model-config.yaml names, and runs every engine.

        Raises:
            RuntimeError: the bundle is missing, damaged or not the one that was archived, or an engine cannot run; the
                message carries which. TorchServe then tries again, and meanwhile calls the model unhealthy.
        """
        try:
            self._initialize(context)
        except DiffuserveError as error:
            log.error("%s", to_wire(error))
            raise RuntimeError(to_wire(error)) from error  # the one exception that TorchServe's worker reports

    def _initialize(self, context: Any) -> None:
        settings = context.model_yaml_config["handler"]
        bundle = Path(settings.get("bundle") or context.system_properties["model_dir"])
        if context.system_properties.get("gpu_id") is not None:
            # The engines use the first GPU that they see.
            os.environ["CUDA_VISIBLE_DEVICES"] = str(context.system_properties["gpu_id"])
        manifest = read_manifest(bundle)
        if manifest.bundle_sha256 != settings["bundle_sha256"]:
            raise BundleError(
                f"{bundle} is not the bundle that was archived. Archive it again: diffuserve archive BUNDLE"
            )
        limits, serving = options_from_config(manifest.model, context.model_yaml_config)
        self._local = LocalPipeline(bundle, limits, serving, load=self.load_engines)
        self._local.warm()
        self._pipeline = self._local.pipeline
        self._metrics = Metrics(context.metrics, context.model_name)
        self._drain_request = DrainRequest.from_environment()
        self._busy_sign = BusySign.from_environment() or nullcontext()

    def handle(self, data: Sequence[dict[str, Any]], context: Any) -> list[bytes]:
        """Answers one batch; every request has an outcome of its own.

        Args:
            data: one mapping for each request, as TorchServe made it of the body, the form or the gRPC inputs.
            context: TorchServe's, of this batch.
        """
        with self._busy_sign:
            received = self.preprocess(data, context)
            return self.postprocess(received, self.inference(received, context), context)

    def preprocess(self, data: Sequence[dict[str, Any]], context: Any) -> list[Received]:
        """Reads and checks each request; what is wrong with one stays with it."""
        if self._drain_request is not None and self._drain_request.made:
            self._pipeline.drain()
        return [
            received_from_data(
                inputs, context.get_all_request_header(index), self._pipeline.manifest.model, self._pipeline.limits
            )
            for index, inputs in enumerate(data)
        ]

    def inference(self, received: Sequence[Received], context: Any) -> list[Outcome]:
        """Draws all requests together, and sends the progress of those that are streamed."""
        events: SimpleQueue[tuple[int, Event | Exception]] = SimpleQueue()
        outcomes: dict[int, Outcome] = {}
        for index, each in enumerate(received):
            if each.request is None:
                outcomes[index] = describe(self._pipeline.manifest, self._pipeline.limits)
                continue
            try:
                self._local.submit(each.checked(), partial(_put, events, index))
            except InvalidRequest as error:
                outcomes[index] = error
        while len(outcomes) < len(received):
            index, event = events.get()
            if isinstance(event, (Completed, DiffuserveError)):
                outcomes[index] = event
            elif isinstance(event, Exception):
                log.error("a request failed", exc_info=event)
                outcomes[index] = StageFailed(f"The server failed on this request: {event!r}")
            elif received[index].streamed:
                _send(json_from_event(event, received[index].checked()), index, context)
        self._metrics.report(len(received), self._pipeline)
        return [outcomes[index] for index in range(len(received))]

    def postprocess(self, received: Sequence[Received], outcomes: Sequence[Outcome], context: Any) -> list[bytes]:
        """Images or errors, in the form that each request asked for."""
        answers = [
            _answer(each, outcome, context, index)
            for index, (each, outcome) in enumerate(zip(received, outcomes, strict=True))
        ]
        return [answer.body for answer in answers]


def _put(events: SimpleQueue[tuple[int, Event | Exception]], index: int, event: Event | Exception) -> None:
    events.put((index, event))


def _answer(received: Received, outcome: Outcome, context: Any, index: int) -> Answer:
    """The answer; its status and headers are told to TorchServe here, which drops the status for gRPC clients."""
    if isinstance(outcome, Description):
        answer = answer_from_description(outcome)
    elif isinstance(outcome, DiffuserveError):
        answer = answer_from_error(outcome)
    else:
        answer = answer_from_completed(outcome, received.checked())
    context.set_response_status(answer.status, answer.reason, index)
    context.set_response_content_type(index, answer.media_type)
    for name, value in answer.headers.items():
        context.set_response_header(index, name, value)
    if not received.http:
        # The end of a stream; without it TorchServe fails on a StreamPredictions call of one answer.
        context.set_response_header(index, "ts_stream_next", "false")
    return answer


def _send(body: bytes, index: int, context: Any) -> None:
    """Sends an answer that is not the last, to this request of the batch alone."""
    from ts.handler_utils.utils import send_intermediate_predict_response

    send_intermediate_predict_response(
        {index: body}, {index: context.get_request_id(index)}, "Intermediate prediction success", 200, context
    )
