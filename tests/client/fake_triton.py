"""A small gRPC server that speaks the protocol of our Triton model; the prompt says how it behaves.

    error TEXT    ends the request with TEXT as its error
    first N TEXT  the same for the first N requests, and draws those after
    silent        accepts the request and sends nothing more
    endless       sends progress until the request is cancelled
    empty         ends the request without an image
    foreign       answers as some other model would
    anything else draws one-coloured images, seed 100 unless given

Run as a program, it prints its port and serves until it is killed.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from diffuserve.images.encoding import encode_image
from diffuserve.response_tensors import RESPONSE
from diffuserve.tensors import NUMPY_DTYPE
from diffuserve.wire import REQUEST

SIDE_PX = 8
# As a server of this version says it, and something that a later one might add.
DESCRIPTION: dict[str, Any] = {
    "model": "fake",
    "family": "stable-diffusion",
    "bundle_sha256": "ab" * 32,
    "safety_checker": False,
    "server_version": "0.1.0",
    "wire_version": 1,
    "fields": {
        "prompt": {"type": "string", "description": "What to draw.", "maxBytes": 8192},
        "steps": {"type": "integer", "description": "Steps.", "default": 3, "minimum": 1, "maximum": 9, "added": 1},
        "width": {"type": "integer", "description": "Pixels.", "default": 8, "multipleOf": 8},
        "sampler": {"type": "string", "description": "How.", "default": "euler", "enum": ["ddim", "euler"]},
    },
    "limits": {"max_rows": 32, "max_guidance_scale": 50.0},
    "added": {"later": True},
}
_KIND = {"BYTES": "string_param", "INT64": "int64_param", "FP64": "double_param", "BOOL": "bool_param"}
_RESPONSE_DTYPE = {spec.name: spec.dtype for spec in RESPONSE}


def response(request_id: str = "", **values: list[Any]) -> service_pb2.ModelInferResponse:
    """A response with these outputs, each a list."""
    message = service_pb2.ModelInferResponse(model_name="stable_diffusion", id=request_id)
    for name, value in values.items():
        dtype = _RESPONSE_DTYPE[name]
        message.outputs.add(name=name, datatype=dtype, shape=[len(value)])
        array = np.array(value, dtype=NUMPY_DTYPE[dtype])
        # What tritonclient makes of an empty tensor has no bytes to take out.
        is_text = dtype == "BYTES"
        message.raw_output_contents.append(
            (serialize_byte_tensor(array).item() if value else b"") if is_text else array.tobytes()
        )
    return message


def fields_from_request(request: service_pb2.ModelInferRequest) -> dict[str, Any]:
    """Inputs and parameters by name, in Python's types; fails on one that is not as the table says."""
    fields: dict[str, Any] = {}
    for name, parameter in request.parameters.items():
        assert not REQUEST[name].tensor
        kind = parameter.WhichOneof("parameter_choice")
        assert kind == _KIND[REQUEST[name].dtype]
        fields[name] = getattr(parameter, kind)
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        assert REQUEST[tensor.name].tensor
        assert tensor.datatype == REQUEST[tensor.name].dtype
        assert list(tensor.shape) == [1]
        if tensor.datatype == "BYTES":
            [value] = deserialize_bytes_tensor(raw)
            fields[tensor.name] = value.decode()
        else:
            [fields[tensor.name]] = np.frombuffer(raw, NUMPY_DTYPE[tensor.datatype]).tolist()
    return fields


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A context manager; `address` is where it listens, `requests` what came but for the `wire_versions`, `cancelled` set
    when one was cancelled, `models` what it says that it has, None for one that says nothing."""

    def __init__(self, port: int = 0) -> None:
        self.requests: list[dict[str, Any]] = []
        self.request_ids: list[str] = []
        self.models: list[str] | None = ["stable_diffusion"]
        self.wire_versions: list[int | None] = []
        self.cancelled = threading.Event()
        self._pool = ThreadPoolExecutor(64)
        self._server = grpc.server(self._pool)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.address = f"127.0.0.1:{self.port}"

    def __enter__(self) -> FakeTriton:
        self._server.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.stop(grace=0).wait()
        self._pool.shutdown()

    def ModelReady(self, request: Any, context: Any) -> service_pb2.ModelReadyResponse:  # noqa: N802
        return service_pb2.ModelReadyResponse(ready=request.name == "stable_diffusion")

    def ModelStatistics(self, request: Any, context: Any) -> service_pb2.ModelStatisticsResponse:  # noqa: N802
        assert not request.name
        if self.models is None:
            context.abort(grpc.StatusCode.UNAVAILABLE, "This protocol is restricted, expecting header 'diffuserve-key'")
        return service_pb2.ModelStatisticsResponse(model_stats=[{"name": name, "version": "1"} for name in self.models])

    def ModelStreamInfer(self, request_iterator: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        for request in request_iterator:
            if request.model_name != "stable_diffusion":
                text = f"Request for unknown model: '{request.model_name}' is not found"
                yield service_pb2.ModelStreamInferResponse(error_message=text)
                continue
            fields = fields_from_request(request)
            self.wire_versions.append(fields.pop("wire_version", None))
            self.requests.append(fields)
            self.request_ids.append(request.id)
            for answer in self._answers(fields, request.id, context):
                if isinstance(answer, str):
                    yield service_pb2.ModelStreamInferResponse(error_message=answer)
                else:
                    yield service_pb2.ModelStreamInferResponse(infer_response=answer)

    def _answers(self, fields: dict[str, Any], request_id: str, context: Any) -> Iterator[Any]:
        if fields.get("describe"):
            yield response(request_id, event=[b"description"], description=[json.dumps(DESCRIPTION).encode()])
            return
        prompt, steps, images = fields["prompt"], fields.get("steps", 3), fields.get("num_images", 1)
        progress, preview = fields.get("progress", False), fields.get("preview", 0)
        ended = threading.Event()

        def on_end() -> None:
            ended.set()
            if prompt in ("silent", "endless"):  # which end in no other way; gRPC does not resume this generator then
                self.cancelled.set()

        if not context.add_callback(on_end):  # it has ended
            on_end()
        if prompt.startswith("error "):
            yield prompt.removeprefix("error ")
            return
        if prompt.startswith("first "):
            _, count, text = prompt.split(" ", 2)
            if len(self.requests) <= int(count):
                yield text
                return
        if prompt == "foreign":
            message = service_pb2.ModelInferResponse(model_name="other")
            message.outputs.add(name="logits", datatype="FP32", shape=[1])
            message.raw_output_contents.append(b"\0\0\0\0")
            yield message
            return
        if progress:
            yield response(request_id, event=[b"accepted"], step=[0], steps=[steps])
        if prompt == "silent":
            ended.wait()
            return
        step = 0
        while step < steps or prompt == "endless":
            if prompt == "endless" and ended.wait(0.02):
                return
            step += 1
            extra = {"preview": [self._image(0, "png", "")] * images} if preview and step % preview == 0 else {}
            if progress:
                yield response(request_id, event=[b"progress"], step=[step], steps=[steps], **extra)
        if prompt == "empty":
            return
        seeds = [fields.get("seed", 100) + index for index in range(images)]
        texts = [f"{prompt}\nSeed: {seed}" for seed in seeds]
        yield response(
            request_id,
            event=[b"completed"],
            image=[
                self._image(*args) for args in zip(seeds, [fields.get("format", "png")] * images, texts, strict=True)
            ],
            flagged=[prompt == "unsafe"] * images,
            seed=seeds,
            width=[SIDE_PX],
            height=[SIDE_PX],
            parameters=[text.encode() for text in texts],
            warnings=[b"too long"] if prompt == "warn" else [],
            queue_s=[0.25],
            denoise_s=[0.5],
            total_s=[0.75],
        )

    @staticmethod
    def _image(seed: int, format: str, text: str) -> bytes:
        return encode_image(np.full((SIDE_PX, SIDE_PX, 3), seed % 256, np.uint8), format, text)


if __name__ == "__main__":
    with FakeTriton() as server:
        print(server.port, flush=True)
        while True:
            time.sleep(60)
