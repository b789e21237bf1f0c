"""Requests to Triton's protobuf and responses from it, by the tables in `diffuserve.wire`."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from diffuserve.description import Description
from diffuserve.errors import InvalidRequest, StageFailed
from diffuserve.request_fields import Field
from diffuserve.response_tensors import RESPONSE
from diffuserve.tensors import NUMPY_DTYPE
from diffuserve.wire import REQUEST
from diffuserve_client.result import Progress, Result, event_from_values

# How a number is packed, and what it has to be.
_PACKED = {
    "BOOL": ("<?", "True or False"),
    "FP64": ("<d", "a number"),
    "INT64": ("<q", "a whole number of 64 bits"),
}
# Which of a parameter's kinds carries a value.
_PARAMETER = {"BYTES": "string_param", "BOOL": "bool_param", "FP64": "double_param", "INT64": "int64_param"}
_RESPONSE_DTYPE = {spec.name: spec.dtype for spec in RESPONSE}


def infer_request_from_fields(model: str, request_id: str, fields: Mapping[str, Any]) -> service_pb2.ModelInferRequest:
    """One protobuf request.

    Args:
        model: the Triton model's name.
        request_id: what the server's log will call the request.
        fields: values by name of `wire.REQUEST`, in Python's types; only those to be sent.

    Raises:
        InvalidRequest: a value does not fit its field's dtype.
    """
    request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    for name, field in REQUEST.items():
        if name not in fields:
            continue
        value = (_text if field.dtype == "BYTES" else _number)(name, field, fields[name])
        if field.tensor:
            request.inputs.add(name=name, datatype=field.dtype, shape=[1])
            request.raw_input_contents.append(_element(field, value))
        else:
            setattr(request.parameters[name], _PARAMETER[field.dtype], value)
    return request


def _text(name: str, field: Field, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} is of type {type(value).__name__}; it must be text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{name} has a lone surrogate at position {error.start}; it must be valid Unicode."
        ) from None
    if not field.tensor and "\0" in value:
        at = value.index("\0")
        raise InvalidRequest(f"{name} has a NUL at position {at}, where Triton would take it to end. Leave it out.")
    return value


def _number(name: str, field: Field, value: Any) -> float:
    code, expected = _PACKED[field.dtype]
    if isinstance(value, (bool, np.bool_)) == (field.dtype == "BOOL"):
        try:
            # Also of numpy's scalars; unlike numpy, it neither cuts 2.5 to 2 nor wraps what is too large.
            [number] = struct.unpack(code, struct.pack(code, value))
        except (struct.error, OverflowError):
            pass
        else:
            return number  # type: ignore[no-any-return]
    raise InvalidRequest(f"{name} is {value!r}; it must be {expected}.")


def _element(field: Field, value: Any) -> bytes:
    """A tensor of one value."""
    if field.dtype == "BYTES":
        text: bytes = serialize_byte_tensor(np.array([value.encode()], dtype=object)).item()
        return text
    return struct.pack(_PACKED[field.dtype][0], value)


def event_from_response(
    response: service_pb2.ModelInferResponse, *, format: str
) -> Progress | Result | Description | None:
    """The event in one response, or None for those that only show that the server is alive.

    Args:
        response: as it came.
        format: what the images were asked for in.

    Raises:
        StageFailed: the response does not follow `wire.RESPONSE`.
    """
    if not response.outputs:
        return None
    try:
        return event_from_values(_values(response), format, response.id)
    except (KeyError, IndexError, ValueError, struct.error) as error:
        outputs = ", ".join(output.name for output in response.outputs)
        raise StageFailed(
            f"The model {response.model_name!r} answered with {outputs}, which is not an answer of diffuserve's "
            f"({type(error).__name__}: {error}). Check the model's name and that client and server are of one version."
        ) from error


def _values(response: service_pb2.ModelInferResponse) -> dict[str, list[Any]]:
    """The outputs that `wire.RESPONSE` knows, as lists of Python's types."""
    values: dict[str, list[Any]] = {}
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        dtype = _RESPONSE_DTYPE.get(output.name)
        if dtype is None:
            continue
        if output.datatype != dtype:
            raise ValueError(f"{output.name} is {output.datatype}, expected {dtype}")
        array = deserialize_bytes_tensor(raw) if dtype == "BYTES" else np.frombuffer(raw, NUMPY_DTYPE[dtype])
        values[output.name] = array.tolist()
    return values
