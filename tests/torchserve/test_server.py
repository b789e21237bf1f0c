"""A real TorchServe: HTTP, gRPC, batches, tokens, and the same images as Triton's."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from PIL import Image

from diffuserve.description import description_from_json
from diffuserve.errors import DeadlineExceeded, DiffuserveError, InvalidRequest, QueueFull, ServerUnavailable
from diffuserve.torchserve.keys import read_inference_token
from diffuserve.torchserve.launcher import TorchServeServer
from diffuserve.trials.similarity import psnr_db
from diffuserve.wire import WIRE_VERSION
from diffuserve_client import AsyncClient, Client, Progress, Result, TorchServe
from tests.gate import Gate
from tests.metrics import read_metrics
from tests.torchserve.conftest import queued
from tests.waiting import LONG_S, wait_for, wait_until

SMALL = {"steps": 2, "width": 64, "height": 64}


def post(
    server: TorchServeServer, body: bytes, media_type: str, *, token: str | None = "", path: str = "stable_diffusion"
) -> tuple[int, str, bytes]:
    """Status, media type and body. The token is the server's unless given; None means none."""
    headers = {"Content-Type": media_type}
    if token is not None:
        headers["Authorization"] = f"Bearer {token or read_inference_token(server.key_file)}"
    request = urllib.request.Request(f"{server.address.http}/predictions/{path}", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=LONG_S) as response:
            return response.status, response.headers["Content-Type"], response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read()


def post_json(server: TorchServeServer, **fields: Any) -> tuple[int, str, bytes]:
    return post(server, json.dumps(fields).encode(), "application/json")


def test_health(torchserve: TorchServeServer, torchserve_client: Client) -> None:
    assert torchserve.running
    assert torchserve_client.is_ready()


def test_describe(torchserve: TorchServeServer, torchserve_client: Client) -> None:
    description = torchserve_client.describe()
    assert (description.model, description.wire_version) == ("tiny-emoji", WIRE_VERSION)
    assert description.fields["width"].default == 128
    form = urllib.parse.urlencode({"describe": "true"}).encode()
    for status, media_type, body in (
        post_json(torchserve, describe=True),
        post(torchserve, form, "application/x-www-form-urlencoded"),
    ):
        assert (status, media_type) == (200, "application/json")
        answer = json.loads(body)
        assert answer.keys() == {"event", "description"}
        assert description_from_json(answer["description"].encode()) == description


def test_a_client_of_another_version_is_told_both(torchserve: TorchServeServer) -> None:
    status, _, body = post_json(torchserve, prompt="a cat", wire_version=99, **SMALL)
    assert status == 400
    assert f"The client speaks version 99 of the wire, and the server version {WIRE_VERSION}." in body.decode()


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_one_image_by_http(torchserve: TorchServeServer, format: str) -> None:
    status, media_type, body = post_json(torchserve, prompt="a cat", seed=7, format=format, **SMALL)
    assert (status, media_type) == (200, f"image/{format}")
    image = Image.open(io.BytesIO(body))
    assert (image.format or "").lower() == format
    assert image.size == (64, 64)


def test_form_fields(torchserve: TorchServeServer) -> None:
    fields = {"prompt": "a cat & a dog", "seed": "7", "guidance_scale": "1", **SMALL}
    form = post(torchserve, urllib.parse.urlencode(fields).encode(), "application/x-www-form-urlencoded")
    assert form[:2] == (200, "image/png")
    assert form == post_json(torchserve, prompt="a cat & a dog", seed=7, guidance_scale=1, **SMALL)


def test_several_images_by_http_are_json(torchserve: TorchServeServer) -> None:
    status, media_type, body = post_json(torchserve, prompt="a cat", seed=7, num_images=2, **SMALL)
    assert (status, media_type) == (200, "application/json")
    answer = json.loads(body)
    assert answer["seed"] == [7, 8]
    assert [Image.open(io.BytesIO(base64.b64decode(data))).size for data in answer["image"]] == [(64, 64)] * 2


@pytest.mark.parametrize(
    ("body", "media_type", "words"),
    [
        (b'{"prompt": "a cat", "steps": 0}', "application/json", "steps is 0"),
        (b'{"prompt": "a cat", "colour": "red"}', "application/json", "Unknown: 'colour'"),
        (b'{"prompt": "a cat", "progress": true}', "application/json", "StreamPredictions"),
        (b"{not json", "application/json", "not valid JSON"),
        (b"[1]", "application/json", "must be an object"),
        (b'{"prompt": "a cat"}', "application/x-www-form-urlencoded", "Content-Type: application/json"),
        (b"prompt=a%20cat&steps=many", "application/x-www-form-urlencoded", "steps is 'many'"),
    ],
)
def test_bad_requests_by_http(torchserve: TorchServeServer, body: bytes, media_type: str, words: str) -> None:
    status, answer_type, answer = post(torchserve, body, media_type)
    assert (status, answer_type) == (400, "application/json")
    error = json.loads(answer)
    assert (error["code"], error["type"]) == (400, "InvalidRequest")
    assert words in error["message"]


def test_a_deadline_and_an_unknown_model_by_http(torchserve: TorchServeServer, worker_gate: Gate) -> None:
    with worker_gate.closed():
        status, media_type, body = post_json(torchserve, prompt="a cat", steps=150, timeout_ms=50)
    assert (status, media_type) == (504, "application/json")
    assert "[deadline_exceeded]" in json.loads(body)["message"]
    status, media_type, body = post(torchserve, b"{}", "application/json", path="other")
    assert (status, json.loads(body)["type"]) == (404, "ModelNotFoundException")


@pytest.mark.parametrize("token", [None, "wrong"])
def test_without_the_token_nothing_is_drawn(torchserve: TorchServeServer, token: str | None) -> None:
    """TorchServe answers with 400 by HTTP, where 401 or 403 would be expected; gRPC has a status for it."""
    status, media_type, body = post(torchserve, b'{"prompt": "a cat"}', "application/json", token=token)
    assert (status, media_type) == (400, "application/json")
    assert json.loads(body)["type"] == "InvalidKeyException"
    with Client(torchserve.address.grpc, server=TorchServe(token)) as client:
        assert not client.is_ready()
        with pytest.raises(InvalidRequest, match="refused the token"):
            client.generate("a cat", steps=1)


def test_the_keys_are_for_this_user_only_and_no_model_can_be_registered(torchserve: TorchServeServer) -> None:
    assert torchserve.key_file.resolve().stat().st_mode & 0o077 == 0
    keys = json.loads(torchserve.key_file.read_text())
    request = urllib.request.Request(
        f"http://{torchserve.address.host}:{torchserve.address.management_port}/models?url=other.mar",
        method="POST",
        headers={"Authorization": f"Bearer {keys['management']['key']}"},
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=LONG_S)
    with caught.value as error:
        assert error.code == 405


def test_progress_and_previews_by_grpc(torchserve_client: Client) -> None:
    *steps, result = torchserve_client.stream("a cat", seed=7, num_images=2, preview=2, **SMALL)  # type: ignore[arg-type]
    assert isinstance(result, Result)
    assert [step.step for step in steps if isinstance(step, Progress)] == [0, 1, 2]
    assert [len(step.previews) for step in steps if isinstance(step, Progress)] == [0, 0, 2]
    assert result.seeds == [7, 8]
    assert [image.size for image in result.images] == [(64, 64)] * 2


def test_asyncio(torchserve: TorchServeServer, torchserve_client: Client) -> None:
    async def draw() -> Result:
        server = TorchServe(read_inference_token(torchserve.key_file))
        async with AsyncClient(torchserve.address.grpc, server=server) as client:
            assert await client.is_ready()
            return await client.generate("a cat", seed=7, **SMALL)  # type: ignore[arg-type]

    assert asyncio.run(draw()).encoded == torchserve_client.generate("a cat", seed=7, **SMALL).encoded  # type: ignore[arg-type]


def test_predictions_by_grpc(torchserve: TorchServeServer) -> None:
    """The call of one answer, as a client of TorchServe's own would make it: an image, or an error that says so."""
    from diffuserve_client.torchserve import _SERVICE, _message

    request = _message("PredictionsRequest")
    metadata = [("authorization", f"Bearer {read_inference_token(torchserve.key_file)}")]
    with grpc.insecure_channel(torchserve.address.grpc) as channel:
        call = channel.unary_unary(
            f"{_SERVICE}/Predictions",
            request_serializer=request.SerializeToString,
            response_deserializer=_message("PredictionResponse").FromString,
        )

        def predict(**inputs: bytes) -> bytes:
            message = request(model_name="stable_diffusion", input=inputs)
            answer: bytes = call(message, metadata=metadata, timeout=LONG_S).prediction
            return answer

        assert predict(data=b'{"prompt": "a cat", "steps": 1}').startswith(b"\x89PNG")
        assert predict(prompt=b"a cat", steps=b"1").startswith(b"\x89PNG")
        error = json.loads(predict(data=b'{"prompt": "a cat", "steps": 1, "progress": true}'))
        assert error["code"] == 400


def test_an_unknown_model_by_grpc(torchserve: TorchServeServer) -> None:
    server = TorchServe(read_inference_token(torchserve.key_file))
    with (
        Client(torchserve.address.grpc, server=server, model="other") as client,
        pytest.raises(ServerUnavailable, match="Model not found"),
    ):
        client.generate("a cat")


def test_a_mixed_batch_with_bad_requests_shares_calls(
    torchserve: TorchServeServer, torchserve_client: Client, worker_gate: Gate
) -> None:
    def figures() -> dict[str, float]:
        """Of all batches until now. TorchServe reads what the worker prints in order, and some time after its answers: once it
        has read the beginning of one batch more, it has read all that was before."""
        torchserve_client.generate("a cat", **SMALL)  # type: ignore[arg-type]
        wait_for(len(worker_gate.batches), lambda: read()["diffuserve_batch_requests_count"])
        return read()

    def read() -> dict[str, float]:
        return {name: value for (name, _), value in read_metrics(torchserve.address.metrics).items()}

    settings: list[dict[str, Any]] = [
        {"steps": 3, "sampler": "euler"},
        {"steps": 5, "sampler": "dpmpp_2m", "guidance_scale": 1.0},
        {"steps": 4, "sampler": "heun", "guidance_scale": 3.0},
        {"steps": 0},
        {"steps": 6, "sampler": "ddim", "num_images": 2},
        {"steps": 3, "width": 96, "sampler": "euler_a"},
        {"steps": 50, "timeout_s": 0.001},
        {"steps": 4, "sampler": "unipc", "format": "webp"},
    ]

    def draw(setting: dict[str, Any], number: int) -> Result | DiffuserveError:
        try:
            return torchserve_client.generate("a rocket", seed=number, **{"width": 64, "height": 64, **setting})
        except DiffuserveError as error:
            return error

    alone = [draw(setting, number) for number, setting in enumerate(settings)]
    before, batches = figures(), len(worker_gate.batches)
    with worker_gate.closed(), ThreadPoolExecutor(len(settings) + 1) as pool:
        busy = pool.submit(draw, SMALL, 0)
        wait_until(lambda: worker_gate.holds)
        waiting = [pool.submit(draw, setting, number) for number, setting in enumerate(settings)]
        wait_for(len(settings), lambda: queued(torchserve.address, torchserve.key_file))
        worker_gate.open()
        assert isinstance(busy.result(), Result)
        together = [each.result() for each in waiting]
    after = figures()
    assert worker_gate.batches[batches:] == [1, len(settings), 1]
    for one, other in zip(alone, together, strict=True):
        assert isinstance(one, Result) == isinstance(other, Result)
        if isinstance(one, Result) and isinstance(other, Result):
            assert one.encoded == other.encoded
    invalid, late = (type(each) for each in together if isinstance(each, DiffuserveError))
    assert invalid is InvalidRequest
    assert late in (DeadlineExceeded, QueueFull)  # refused at arrival, if others were accepted before it

    def added(name: str) -> float:
        return after[name] - before[name]

    assert added("diffuserve_batch_requests_count") == 3
    assert added("diffuserve_batch_requests_sum") == len(settings) + 2
    assert added("diffuserve_unet_rows") / added("diffuserve_unet_calls") > 3


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a"])
def test_the_image_is_the_one_that_triton_serves(sampler: str, torchserve_client: Client, client: Client) -> None:
    settings: dict[str, Any] = {"seed": 7, "steps": 8, "sampler": sampler}
    prompt = "a slice of pizza, glossy, on a blue background"
    on_triton, on_torchserve = (each.generate(prompt, **settings) for each in (client, torchserve_client))
    figure = psnr_db(on_torchserve.images[0], on_triton.images[0])
    print(f"{sampler}: PSNR of TorchServe's image against Triton's: {figure:.1f} dB")
    assert figure >= 50
    assert on_torchserve.parameters == on_triton.parameters


def test_warnings_come_too(torchserve_client: Client) -> None:
    result = torchserve_client.generate("a cat AND a dog", steps=1)
    [warning] = result.warnings
    assert "AND" in warning
