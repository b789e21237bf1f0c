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
from tests.waiting import LONG_S


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
        ({"steps": 2**32 + 2}, "steps is 4294967298; it must be from 1 to 150"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan; it must be from 0 to 50"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1"),
        ({"guidance_scale": 1e39}, "guidance_scale is 1e+39"),
        ({"width": 0}, "width is 0 px; it must be a multiple of 32 from 32 to 256"),
        ({"height": 0}, "height is 0 px"),
        ({"width": -32}, "width is -32 px"),
        ({"width": 72}, "Nearest: 64 or 96"),
        ({"height": 512}, "height is 512 px; it must be a multiple of 32 from 32 to 256"),
        ({"width": 2**33 + 128}, "width is 8589934720 px; it must be a multiple of 32 from 32 to 256"),
        ({"sampler": "plms"}, "sampler is 'plms'; it must be one of ddim, euler, euler_a, dpmpp_2m, dpmpp_2m_karras"),
        ({"format": "bmp"}, "format is 'bmp'; it must be one of png, jpeg, webp, raw"),
        ({"seed": -1}, "seed is -1; it must be from 0 to 4294967295"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"seed": 2**63 - 1}, "seed is 9223372036854775807"),
        ({"num_images": 0}, "num_images is 0; it must be from 1 to 16"),
        ({"num_images": 17}, "num_images is 17"),
        ({"num_images": -(2**32) + 1}, "num_images is -4294967295"),
        ({"priority": 10}, "priority is 10; it must be from 0 to 9"),
        ({"priority": 2**32}, "priority is 4294967296"),
        ({"timeout_s": 2**40}, "timeout_ms is 1099511627776000; it must be from 0 to 86400000"),
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


def error_of(server: TritonServer, inputs: list[Input], **parameters: tuple[str, Any]) -> str:
    """`parameters`: of the request, each of a kind."""
    request = service_pb2.ModelInferRequest(model_name="stable_diffusion")
    for name, datatype, shape, raw in inputs:
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(raw)
    for name, (kind, value) in parameters.items():
        setattr(request.parameters[name], kind, value)
    with grpc.insecure_channel(server.address.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return "".join(answer.error_message for answer in stub.ModelStreamInfer(iter([request]), timeout=LONG_S))


PROMPT = text_input("prompt", b"x")
PRIORITY = ("priority", "INT64", [1], np.int64(3).tobytes())


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([PRIORITY], "prompt is missing"),
        ([], "prompt is missing"),
        ([PROMPT, PRIORITY, PRIORITY], "priority"),
        ([PROMPT, ("priority", "FP32", [1], np.float32(3).tobytes())], "priority"),
        # As clients of earlier versions send them.
        (
            [PROMPT, ("priority", "INT32", [1], np.int32(3).tobytes())],
            "'INT32', but model 'stable_diffusion' expects 'INT64'",
        ),
        ([PROMPT, ("steps", "INT32", [1], np.int32(3).tobytes())], "unexpected inference input 'steps'"),
        ([PROMPT, ("priority", "INT64", [1, 1], np.int64(3).tobytes())], "priority"),
        ([text_input("prompt", b"x", b"y")], "prompt"),
        ([text_input("prompt", b"\xff\xfe")], "prompt is not UTF-8"),
        ([PROMPT, text_input("colour", b"red")], "colour"),
    ],
    ids=["missing", "empty", "repeated", "dtype", "older dtype", "older", "rank", "two values", "not UTF-8", "unknown"],
)
def test_a_malformed_message(server: TritonServer, inputs: list[Input], words: str) -> None:
    assert words in error_of(server, inputs)


@pytest.mark.parametrize(
    ("name", "kind", "value", "words"),
    [
        (
            "colour",
            "string_param",
            "red",
            "Unknown: 'colour'. A request has these fields: prompt, negative_prompt, steps",
        ),
        ("steps", "double_param", 2.0, "steps is 2.0; it must be a whole number from 1 to 150"),
        ("steps", "string_param", "20", "steps is '20'; it must be a whole number"),
        ("steps", "uint64_param", 20, "invalid value type for 'steps' parameter, expected int64_param, bool_param"),
        ("seed", "bool_param", True, "seed is True; it must be a whole number"),
        ("guidance_scale", "double_param", float("nan"), "guidance_scale is nan; it must be from 0 to 50"),
        ("guidance_scale", "double_param", float("-inf"), "guidance_scale is -inf; it must be from 0 to 50"),
        ("progress", "int64_param", 1, "progress is 1; it must be true or false"),
        ("sampler", "int64_param", 3, "sampler is 3; it must be one of"),
        ("client_id", "double_param", 0.5, "client_id is of type float; it must be text"),
        (
            "negative_prompt",
            "string_param",
            "x",
            "negative_prompt came as a parameter of the request. Send it as an input",
        ),
    ],
)
def test_a_parameter_that_is_refused(server: TritonServer, name: str, kind: str, value: Any, words: str) -> None:
    assert words in error_of(server, [PROMPT], **{name: (kind, value)})


def test_parameters_of_tritons_own_are_no_fields(server: TritonServer) -> None:
    small = {name: ("int64_param", value) for name, value in (("steps", 1), ("width", 32), ("height", 32))}
    for name, kind in (("triton_enable_empty_final_response", ("bool_param", True)), ("id", ("string_param", "7"))):
        assert error_of(server, [PROMPT], **small, **{name: kind}) == ""


def test_plain_infer_says_that_it_cannot_work(server: TritonServer) -> None:
    name, datatype, shape, raw = text_input("prompt", b"x")
    request = service_pb2.ModelInferRequest(model_name="stable_diffusion", raw_input_contents=[raw])
    request.inputs.add(name=name, datatype=datatype, shape=shape)
    with grpc.insecure_channel(server.address.grpc) as channel, pytest.raises(grpc.RpcError, match="decoupled"):
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=LONG_S)
