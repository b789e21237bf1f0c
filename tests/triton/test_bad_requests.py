"""Each bad request gets a clear error over the real wire, and its neighbours their images."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import serialize_byte_tensor

from diffuserve.errors import InvalidRequest
from diffuserve.triton.launcher import TritonServer
from diffuserve_client import Client


@pytest.fixture(autouse=True)
def neighbour(client: Client) -> Iterator[None]:
    """A good request that runs meanwhile."""
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(client.generate("an apple", steps=4)))
    thread.start()
    yield
    thread.join()
    assert result[0].images[0].size == (128, 128)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": 0}, "steps is 0; it must be from 1 to 150"),
        ({"steps": -3}, "steps is -3"),
        ({"steps": 151}, "steps is 151"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan; it must be from 0 to 50"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1"),
        ({"width": 0}, "width is 0 px; it must be a multiple of 32 from 32 to 256"),
        ({"height": 0}, "height is 0 px"),
        ({"width": -32}, "width is -32 px"),
        ({"width": 72}, "Nearest: 64 or 96"),
        ({"height": 512}, "height is 512 px; it must be a multiple of 32 from 32 to 256"),
        ({"sampler": "plms"}, "sampler is 'plms'; it must be one of ddim, euler, euler_a, dpmpp_2m, dpmpp_2m_karras"),
        ({"format": "bmp"}, "format is 'bmp'; it must be one of png, jpeg, webp, raw"),
        ({"seed": -1}, "seed is -1; it must be from 0 to 4294967295"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"num_images": 0}, "num_images is 0; it must be from 1 to 16"),
        ({"num_images": 17}, "num_images is 17"),
        ({"priority": 10}, "priority is 10; it must be from 0 to 9"),
        ({"prompt": "x" * 1_000_000}, "prompt has 1000000 bytes; at most 8192 are allowed"),
    ],
)
def test_a_value_out_of_range(client: Client, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.generate(**{"prompt": "x", **fields})
    assert words in str(caught.value)


Input = tuple[str, str, list[int], bytes]


def text_input(name: str, *values: bytes) -> Input:
    return name, "BYTES", [len(values)], serialize_byte_tensor(np.array(values, object)).item()


def error_of(server: TritonServer, inputs: list[Input]) -> str:
    request = service_pb2.ModelInferRequest(model_name="stable_diffusion")
    for name, datatype, shape, raw in inputs:
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(raw)
    with grpc.insecure_channel(server.address.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return "".join(answer.error_message for answer in stub.ModelStreamInfer(iter([request]), timeout=30))


STEPS = ("steps", "INT32", [1], np.int32(3).tobytes())


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([STEPS], "prompt"),
        ([text_input("prompt", b"x"), STEPS, STEPS], "steps"),
        ([text_input("prompt", b"x"), ("steps", "FP32", [1], np.float32(3).tobytes())], "steps"),
        ([text_input("prompt", b"x"), ("steps", "INT32", [1, 1], np.int32(3).tobytes())], "steps"),
        ([text_input("prompt", b"x", b"y")], "prompt"),
        ([text_input("prompt", b"\xff\xfe")], "prompt is not UTF-8"),
        ([text_input("prompt", b"x"), text_input("colour", b"red")], "colour"),
    ],
    ids=["missing", "repeated", "dtype", "rank", "two values", "not UTF-8", "unknown"],
)
def test_a_malformed_message(server: TritonServer, inputs: list[Input], words: str) -> None:
    assert words in error_of(server, inputs)


def test_an_unknown_parameter_is_refused_by_name(server: TritonServer) -> None:
    name, datatype, shape, raw = text_input("prompt", b"x")
    request = service_pb2.ModelInferRequest(model_name="stable_diffusion", raw_input_contents=[raw])
    request.inputs.add(name=name, datatype=datatype, shape=shape)
    request.parameters["colour"].string_param = "red"
    with grpc.insecure_channel(server.address.grpc) as channel:
        answers = list(service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([request]), timeout=30))
    assert "Unknown: colour" in answers[0].error_message


def test_plain_infer_says_that_it_cannot_work(server: TritonServer) -> None:
    name, datatype, shape, raw = text_input("prompt", b"x")
    request = service_pb2.ModelInferRequest(model_name="stable_diffusion", raw_input_contents=[raw])
    request.inputs.add(name=name, datatype=datatype, shape=shape)
    with grpc.insecure_channel(server.address.grpc) as channel, pytest.raises(grpc.RpcError, match="decoupled"):
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=30)
