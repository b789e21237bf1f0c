"""What TorchServe hands over for one request, to a checked request of ours.

The fields are those of the Triton model (`diffuserve.wire.REQUEST`), as

- a JSON object: the body of an HTTP request, or the gRPC input `data`, or `stream` for StreamPredictions;
- or one form field, query parameter or gRPC input each, as text.

The encoding is `binary` unless the request says otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffuserve.bundle.manifest import ModelSpec
from diffuserve.errors import InvalidRequest
from diffuserve.limits import Limits
from diffuserve.request import TextToImageRequest
from diffuserve.wire import REQUEST, request_from_wire

# A worker is not told by which call a gRPC request came. Progress sent to a Predictions call, which takes one answer, would
# make TorchServe end the worker, so a client says by this input's name that its call is StreamPredictions.
STREAM_INPUT = "stream"
_JSON_INPUTS = ("body", "data", STREAM_INPUT)
# TorchServe's own, on gRPC requests too.
_SEQUENCE_HEADERS = "ts_request_sequence"


@dataclass(frozen=True)
class Received:
    """`request`: what is to be drawn, or why not, or None where the server's description is asked for; `http`: whether it
    came by HTTP, else by gRPC."""

    request: TextToImageRequest | InvalidRequest | None
    http: bool

    def checked(self) -> TextToImageRequest:
        """Raises InvalidRequest if there is nothing that can be drawn."""
        if isinstance(self.request, TextToImageRequest):
            return self.request
        raise self.request or InvalidRequest("The request asks for a description, which is not drawn.")

    @property
    def streamed(self) -> bool:
        """Whether the client takes events before the last."""
        return isinstance(self.request, TextToImageRequest) and self.request.progress


def received_from_data(
    inputs: Mapping[str, Any], headers: Mapping[str, Any], model: ModelSpec, limits: Limits
) -> Received:
    """Reads one request of a batch; whatever is wrong with it is in the result.

    Args:
        inputs: TorchServe's: by name, bytes, or what it has decoded.
        headers: TorchServe's: text by the names of HTTP headers, a mapping by the names of inputs.
        model, limits: what requests are checked against.
    """
    http = any(isinstance(value, str) and not name.startswith(_SEQUENCE_HEADERS) for name, value in headers.items())
    try:
        fields = {"encoding": "binary", **_fields_from_inputs(inputs)}
        request = request_from_wire(fields, model, limits)
        if request is not None and request.progress and (http or STREAM_INPUT not in inputs):
            raise InvalidRequest(
                "progress is true, which only a StreamPredictions call of gRPC can carry. Send the request there, as the "
                f"input {STREAM_INPUT!r}, or leave progress out."
            )
    except InvalidRequest as error:
        return Received(error, http)
    return Received(request, http)


def _fields_from_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    for name in _JSON_INPUTS:
        if name in inputs:
            if len(inputs) > 1:
                others = ", ".join(sorted(set(inputs) - {name}))
                raise InvalidRequest(
                    f"The request is in {name!r}, and there are also: {others}. Put all into the JSON."
                )
            return _fields_from_json(inputs[name])
    if not inputs or any(name.startswith("{") for name in inputs):
        raise InvalidRequest(
            "The request has no fields, or is JSON that came as a form. Send JSON with Content-Type: application/json."
        )
    return {name: _value_from_text(name, value) for name, value in inputs.items()}


def _fields_from_json(body: Any) -> dict[str, Any]:
    if isinstance(body, (bytes, bytearray, str)):
        try:
            body = json.loads(body)
        except (ValueError, RecursionError):
            raise InvalidRequest(
                'The request is not valid JSON. Send an object, such as {"prompt": "a cat"}.'
            ) from None
    if not isinstance(body, dict):
        raise InvalidRequest(
            f'The request is JSON of type {type(body).__name__}; it must be an object, such as {{"prompt": "a cat"}}.'
        )
    return body


def _bool(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


def _int(text: str) -> int:
    if not _DIGITS.fullmatch(text):
        raise ValueError
    return int(text)


def _float(text: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise ValueError
    return float(text)


# Python's own conversions take 1_000 and digits of other scripts too.
_DIGITS = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_FROM_TEXT: dict[str, Callable[[str], Any]] = {"BOOL": _bool, "INT64": _int, "FP64": _float}


def _value_from_text(name: str, value: Any) -> Any:
    """A form field's value; what does not fit its type is left for the check, whose message names what is allowed."""
    if isinstance(value, (bytes, bytearray)):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"{name} is not UTF-8 (at byte {error.start}). Encode it as UTF-8.") from None
    convert = _FROM_TEXT.get(REQUEST[name].dtype) if name in REQUEST else None
    if convert is None or not isinstance(value, str):
        return value
    try:
        return convert(value)
    except (ValueError, KeyError):
        return value
