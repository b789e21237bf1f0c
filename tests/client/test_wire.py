"""Requests to protobuf and responses from it."""

from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from diffuserve.errors import InvalidRequest, StageFailed
from diffuserve.images.encoding import encode_image
from diffuserve.request import RequestFields
from diffuserve.wire import REQUEST
from diffuserve_client.fields import wire_fields
from diffuserve_client.result import Progress, Result
from diffuserve_client.wire import event_from_response, infer_request_from_fields
from tests.client.fake_triton import fields_from_request, response


def round_trip(**fields: Any) -> dict[str, Any]:
    sent = infer_request_from_fields("stable_diffusion", "id-1", fields)
    received = service_pb2.ModelInferRequest.FromString(sent.SerializeToString())
    assert (received.model_name, received.id) == ("stable_diffusion", "id-1")
    return fields_from_request(received)


def test_every_field_arrives() -> None:
    fields = {
        "prompt": "ein Stück Pizza 🍕",
        "negative_prompt": "",
        "steps": 20,
        "guidance_scale": 7.5,
        "seed": 2**32 - 1,
        "width": 64,
        "height": 32,
        "sampler": "euler",
        "num_images": 2,
        "priority": 0,
        "client_id": "me",
        "timeout_ms": 1500,
        "format": "png",
        "encoding": "binary",
        "progress": True,
        "preview": 5,
    }
    of_kind = {"BYTES": "text", "INT64": 2**40, "FP64": 0.1, "BOOL": True}
    fields = {name: fields.get(name, of_kind[field.dtype]) for name, field in REQUEST.items()}
    assert round_trip(**fields) == fields


def test_numpy_scalars_arrive() -> None:
    assert round_trip(steps=np.int64(4), guidance_scale=np.float32(1.5)) == {"steps": 4, "guidance_scale": 1.5}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 2.5, "steps is 2.5; it must be a whole number"),
        ("steps", "20", "steps is '20'; it must be a whole number"),
        ("steps", True, "steps is True; it must be a whole number"),
        ("steps", 2**63, "steps is 9223372036854775808; it must be a whole number of 64 bits"),
        ("priority", -(2**63) - 1, "priority is -9223372036854775809; it must be a whole number of 64 bits"),
        ("priority", 2.0, "priority is 2.0; it must be a whole number"),
        ("guidance_scale", "7", "guidance_scale is '7'; it must be a number"),
        ("guidance_scale", 10**400, "guidance_scale is 1000.*; it must be a number"),
        ("guidance_scale", False, "guidance_scale is False; it must be a number"),
        ("client_id", "a\0b", "client_id has a NUL at position 1, where Triton would take it to end"),
        ("sampler", "euler\0", "sampler has a NUL at position 5"),
        ("prompt", b"bytes", "prompt is of type bytes; it must be text"),
        ("prompt", "\ud800", "lone surrogate at position 0"),
        ("progress", 1, "progress is 1; it must be True or False"),
    ],
)
def test_wrong_types_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        round_trip(**{field: value})


def test_numbers_arrive_as_they_were_sent() -> None:
    """For the server to refuse, which knows what it allows."""
    fields = {"steps": 2**32 + 2, "width": -(2**40), "priority": 2**33, "seed": 2**63 - 1, "guidance_scale": 1e39}
    assert round_trip(**fields) == fields
    assert round_trip(guidance_scale=4.1)["guidance_scale"] == 4.1
    assert np.isnan(round_trip(guidance_scale=float("nan"))["guidance_scale"])


def test_a_nul_in_a_prompt_arrives() -> None:
    fields = {"prompt": "a\0b", "negative_prompt": "\0"}
    assert round_trip(**fields) == fields


def test_fields_that_are_none_are_not_sent() -> None:
    fields = dict.fromkeys(RequestFields.__annotations__)
    assert wire_fields("a cat", fields, progress=False, preview=0) == {"prompt": "a cat"}


def test_timeout_becomes_milliseconds() -> None:
    def timeout_ms(timeout_s: Any) -> Any:
        return wire_fields("", {"timeout_s": timeout_s}, progress=False, preview=0)["timeout_ms"]

    assert timeout_ms(1.5) == 1500
    assert timeout_ms(0.0001) == 1  # not 0, which would be no limit at all
    for wrong in (0, -1, float("nan"), float("inf"), "3", True):
        with pytest.raises(InvalidRequest, match="timeout_s"):
            timeout_ms(wrong)


def test_unknown_keyword() -> None:
    with pytest.raises(TypeError, match=r"unknown keyword stepps; a request takes .*steps"):
        wire_fields("", {"stepps": 3}, progress=False, preview=0)


def test_accepted_and_progress() -> None:
    preview = encode_image(np.zeros((2, 4, 3), np.uint8), "png")
    assert event_from_response(response(event=[b"accepted"], step=[0], steps=[9]), format="png") == Progress(0, 9)
    event = event_from_response(response(event=[b"progress"], step=[3], steps=[9], preview=[preview]), format="png")
    assert event == Progress(3, 9, encoded_previews=[preview])
    assert isinstance(event, Progress) and event.preview is not None
    assert event.preview.size == (4, 2)
    assert Progress(3, 9).preview is None


def completed(**changes: Any) -> service_pb2.ModelInferResponse:
    values: dict[str, Any] = {
        "event": [b"completed"],
        "image": [b"\x01\x02\x03" * 6, b"\x00" * 18],
        "flagged": [False, True],
        "seed": [2**32 - 1, 0],
        "width": [3],
        "height": [2],
        "parameters": ["ä".encode(), b"b"],
        "warnings": [],
        "queue_s": [0.5],
        "denoise_s": [1.0],
        "total_s": [2.0],
    }
    return response("id-1", **{**values, **changes})


def test_result() -> None:
    result = event_from_response(completed(), format="raw")
    assert result == Result(
        encoded=[b"\x01\x02\x03" * 6, b"\x00" * 18],
        format="raw",
        flagged=[False, True],
        seeds=[2**32 - 1, 0],
        width=3,
        height=2,
        parameters=["ä", "b"],
        warnings=[],
        queue_s=0.5,
        denoise_s=1.0,
        total_s=2.0,
        request_id="id-1",
    )
    assert result.images[0].size == (3, 2)
    assert result.images[0].getpixel((2, 1)) == (1, 2, 3)


def test_events_of_a_newer_server_are_passed_over() -> None:
    assert event_from_response(response(event=[b"queued"]), format="png") is None
    assert event_from_response(service_pb2.ModelInferResponse(), format="png") is None


@pytest.mark.parametrize("changes", [{"event": []}, {"width": []}])
def test_incomplete_answers(changes: dict[str, Any]) -> None:
    with pytest.raises(StageFailed, match="not an answer of diffuserve's"):
        event_from_response(completed(**changes), format="png")


def test_damaged_answers() -> None:
    cut = completed()
    cut.raw_output_contents[1] = cut.raw_output_contents[1][:-1]
    missing = completed()
    del missing.raw_output_contents[-1]
    other_dtype = completed()
    other_dtype.outputs[2].datatype = "INT32"
    for damaged in (cut, missing, other_dtype):
        with pytest.raises(StageFailed, match="not an answer of diffuserve's"):
            event_from_response(damaged, format="png")
