"""Requests to protobuf and responses from it, by the tables in `diffuserve.tensors`."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from diffuserve.errors import InvalidRequest, StageFailed
from diffuserve.tensors import NUMPY_DTYPE, REQUEST, RESPONSE, TensorSpec
from diffuserve_client.result import Progress, Result

# How a value is packed, and what it has to be.
_PACKED = {
    "BOOL": ("?", "True or False"),
    "FP32": ("<f", "a number of 32 bits"),
    "INT32": ("<i", "a whole number of 32 bits"),
    "INT64": ("<q", "a whole number of 64 bits"),
}
_RESPONSE_DTYPE = {spec.name: spec.dtype for spec in RESPONSE}


def request_from_fields(model: str, request_id: str, fields: Mapping[str, Any]) -> service_pb2.ModelInferRequest:
    """One protobuf request.

    Args:
        model: the Triton model's name.
        request_id: what the server's log will call the request.
        fields: values by name of `tensors.REQUEST`, in Python's types; only those to be sent.

    Raises:
        InvalidRequest: a value does not fit its tensor's dtype.
    """
    request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    for spec in REQUEST:
        if spec.name in fields:
            request.inputs.add(name=spec.name, datatype=spec.dtype, shape=[1])
            request.raw_input_contents.append(_encode(spec, fields[spec.name]))
    return request


def _encode(spec: TensorSpec, value: Any) -> bytes:
    if spec.dtype == "BYTES":
        if not isinstance(value, str):
            raise InvalidRequest(f"{spec.name} is of type {type(value).__name__}; it must be text.")
        try:
            data = value.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"{spec.name} has a lone surrogate at position {error.start}; it must be valid Unicode."
            ) from None
        encoded: bytes = serialize_byte_tensor(np.array([data], dtype=object)).item()
        return encoded
    code, kind = _PACKED[spec.dtype]
    if isinstance(value, (bool, np.bool_)) != (spec.dtype == "BOOL"):
        raise InvalidRequest(f"{spec.name} is {value!r}; it must be {kind}.")
    try:
        return struct.pack(code, value)  # unlike numpy, it neither cuts 2.5 to 2 nor wraps what is too large
    except (struct.error, OverflowError):
        raise InvalidRequest(f"{spec.name} is {value!r}; it must be {kind}.") from None


def event_from_response(response: service_pb2.ModelInferResponse, *, format: str) -> Progress | Result | None:
    """The event in one response, or None for those that only show that the server is alive.

    Args:
        response: as it came.
        format: what the images were asked for in.

    Raises:
        StageFailed: the response does not follow `tensors.RESPONSE`.
    """
    if not response.outputs:
        return None
    try:
        values = _values(response)
        event = values["event"][0].decode()
        if event == "accepted" and "steps" in values:
            return Progress(0, values["steps"][0], position=values.get("position", [0])[0])
        if event == "progress":
            previews = values.get("preview", [])
            eta_s = values.get("eta_s", [None])[0]
            return Progress(values["step"][0], values["steps"][0], eta_s=eta_s, encoded_previews=previews)
        if event == "completed":
            return Result(
                encoded=values["image"],
                format=format,
                flagged=values["flagged"],
                seeds=values["seed"],
                width=values["width"][0],
                height=values["height"][0],
                parameters=[text.decode(errors="replace") for text in values["parameters"]],
                warnings=[text.decode(errors="replace") for text in values["warnings"]],
                queue_s=values["queue_s"][0],
                denoise_s=values["denoise_s"][0],
                total_s=values["total_s"][0],
                request_id=response.id,
            )
    except (KeyError, IndexError, ValueError, struct.error) as error:
        outputs = ", ".join(output.name for output in response.outputs)
        raise StageFailed(
            f"The model {response.model_name!r} answered with {outputs}, which is no answer of diffuserve's "
            f"({type(error).__name__}: {error}). Check the model's name and that client and server are of one version."
        ) from error
    return None


def _values(response: service_pb2.ModelInferResponse) -> dict[str, list[Any]]:
    """The outputs that `tensors.RESPONSE` knows, as lists of Python's types."""
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
