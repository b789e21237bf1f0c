"""TorchServe's side of `diffuserve_client.server`: JSON in the messages of its StreamPredictions.

TorchServe's package carries its protocol for Java only. The three messages that are used have four fields, so their
descriptors are built here, with the names and numbers of TorchServe's inference.proto; that file also imports another of
Google's, which would be one more dependency.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from diffuserve.defaults import TORCHSERVE
from diffuserve.description import Description
from diffuserve.errors import DiffuserveError, InvalidRequest, StageFailed, from_wire
from diffuserve.response_tensors import FILES
from diffuserve_client.result import Progress, Result, event_from_values

_PACKAGE = "org.pytorch.serve.grpc.inference"
_SERVICE = f"/{_PACKAGE}.InferenceAPIsService"
# The input's name tells our handler that this is a call which takes several answers.
_INPUT = "stream"


@dataclass(frozen=True)
class TorchServe:
    """TorchServe with our handler.

    Args:
        token: the inference key of the server's file of keys, see `diffuserve.torchserve.keys`; None if it asks for none.
    """

    token: str | None = field(default=None, repr=False)
    name: str = "TorchServe"
    default_url: str = f"localhost:{TORCHSERVE.grpc}"

    def request(self, model: str, request_id: str, fields: Mapping[str, Any]) -> Any:
        try:
            body = json.dumps({**fields, "encoding": "base64"}).encode()
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"The request does not fit into JSON: {error}.") from None
        return _message("PredictionsRequest")(model_name=model, input={_INPUT: body})

    def call(self, channel: Any, request: Any) -> Any:
        call = channel.unary_stream(
            f"{_SERVICE}/StreamPredictions",
            request_serializer=_message("PredictionsRequest").SerializeToString,
            response_deserializer=_message("PredictionResponse").FromString,
        )
        return call(request, metadata=self._metadata())

    def event(
        self, message: Any, *, address: str, model: str, format: str, request_id: str
    ) -> Progress | Result | Description | DiffuserveError | None:
        try:
            answer = json.loads(message.prediction)
            if "code" in answer:
                return from_wire(answer["message"]) or StageFailed(answer["message"])
            return event_from_values(_values(answer), format, request_id)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise StageFailed(
                f"The model {model!r} at {address} sent no answer of diffuserve's ({type(error).__name__}: {error}). "
                "Check the model's name and that client and server are of one version."
            ) from error

    def ask_ready(self, channel: Any, model: str, timeout_s: float) -> Any:
        call = channel.unary_unary(
            f"{_SERVICE}/Ping",
            request_serializer=lambda nothing: nothing,
            response_deserializer=_message("TorchServeHealthResponse").FromString,
        )
        return call(b"", timeout=timeout_s, metadata=self._metadata())

    def ask_models(self, channel: Any, timeout_s: float) -> Any:
        return None  # TorchServe tells them only to who has its management key

    def models(self, answer: Any) -> Sequence[str]:
        return ()

    def is_ready(self, answer: Any) -> bool:
        return bool(json.loads(answer.health).get("status") == "Healthy")

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)


def _values(answer: Mapping[str, Any]) -> dict[str, list[Any]]:
    """As `event_from_values` takes them."""
    values = {}
    for name, value in answer.items():
        items = value if isinstance(value, list) else [value]
        values[name] = [_from_json(name, item) for item in items]
    return values


def _from_json(name: str, item: Any) -> Any:
    if name in FILES:
        return base64.b64decode(item, validate=True)
    return item.encode() if isinstance(item, str) else item


@cache
def _message(name: str) -> Any:
    """The class of one of TorchServe's messages."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="inference.proto", package=_PACKAGE, syntax="proto3")
    request = file.message_type.add(name="PredictionsRequest")
    request.field.add(name="model_name", number=1, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    # A map<string, bytes> is a repeated message of this kind.
    entry = request.nested_type.add(name="InputEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    entry.field.add(name="value", number=2, type=kinds.TYPE_BYTES, label=kinds.LABEL_OPTIONAL)
    request.field.add(
        name="input",
        number=3,
        type=kinds.TYPE_MESSAGE,
        type_name=f".{_PACKAGE}.PredictionsRequest.InputEntry",
        label=kinds.LABEL_REPEATED,
    )
    response = file.message_type.add(name="PredictionResponse")
    response.field.add(name="prediction", number=1, type=kinds.TYPE_BYTES, label=kinds.LABEL_OPTIONAL)
    health = file.message_type.add(name="TorchServeHealthResponse")
    health.field.add(name="health", number=1, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    # A pool of its own, so that a program which has TorchServe's compiled protocol too does not meet two of one name.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
