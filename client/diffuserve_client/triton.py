"""Triton's side of `diffuserve_client.server`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tritonclient.grpc import service_pb2, service_pb2_grpc

from diffuserve.description import Description
from diffuserve.errors import DiffuserveError
from diffuserve.triton.stage_models import inflight_models
from diffuserve_client.endpoint import DEFAULT_URL
from diffuserve_client.failures import error_from_text
from diffuserve_client.result import Progress, Result
from diffuserve_client.wire import event_from_response, infer_request_from_fields


@dataclass(frozen=True)
class Triton:
    """Triton, which authenticates nobody."""

    name: str = "Triton"
    default_url: str = DEFAULT_URL

    def request(self, model: str, request_id: str, fields: Mapping[str, Any]) -> Any:
        return infer_request_from_fields(model, request_id, {**fields, "encoding": "binary"})

    def call(self, channel: Any, request: Any) -> Any:
        # The method takes a stream of requests, of which one and its end look just like a single one; as a stream it would
        # take a thread for each.
        call = channel.unary_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )
        return call(request)

    def event(
        self, message: Any, *, address: str, model: str, format: str, request_id: str
    ) -> Progress | Result | Description | DiffuserveError | None:
        if message.error_message:
            return error_from_text(message.error_message, address=address, model=model)
        return event_from_response(message.infer_response, format=format)

    def ask_ready(self, channel: Any, model: str, timeout_s: float) -> Any:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return stub.ModelReady(service_pb2.ModelReadyRequest(name=model), timeout=timeout_s)

    def is_ready(self, answer: Any) -> bool:
        return bool(answer.ready)

    def ask_models(self, channel: Any, timeout_s: float) -> Any:
        # The index of the repository is restricted to the launcher; the statistics of all models name them too.
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return stub.ModelStatistics(service_pb2.ModelStatisticsRequest(), timeout=timeout_s)

    def models(self, answer: Any) -> Sequence[str]:
        return inflight_models(each.name for each in answer.model_stats)
