"""Requests that are none: random bytes on both ports, JSON that says something else, tensors and parameters of other kinds."""

from __future__ import annotations

import http.client
import json
import math
import random
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from diffuserve.request import FIELDS
from diffuserve_faults.case import Cases, Trial

_REQUESTS = 10_000
_THREADS = 8
_TIMEOUT_S = 60.0
_VALID: dict[str, Any] = {"prompt": "x", "steps": 1, "width": 32, "height": 32, "guidance_scale": 1.0}
_NUMBERS = (*(name for name, field in FIELDS.items() if field.dtype == "INT64"), "guidance_scale")
_NAMES = (*(name for name in FIELDS if name != "prompt"), "colour", "")
_PARAMETERS = (
    ("bool_param", True),
    ("int64_param", 2**32 + 2),
    ("int64_param", -(2**63)),
    ("uint64_param", 2**64 - 1),
    ("double_param", math.nan),
    ("double_param", -math.inf),
    ("string_param", "\0\u202e\U0001f355" * 50),
)
_DTYPES = ("BOOL", "INT8", "INT32", "INT64", "UINT64", "FP16", "FP32", "FP64", "BYTES", "FP7", "")

Attack = Callable[[Trial, random.Random], None]


def send_garbage(trial: Trial) -> None:
    """Each must be refused, and cost nobody else anything. Seeded by its number, so that a run can be repeated."""
    attacks: tuple[Attack, ...] = (_bytes_to_http, _bytes_to_grpc, _json, _json, _messages)

    def attack(number: int) -> None:
        chosen = attacks[number % len(attacks)]
        try:
            chosen(trial, random.Random(number))  # noqa: S311 - a load, no secret
        except TimeoutError:
            trial.tally.lose(f"number {number}, {chosen.__name__}: nothing within {_TIMEOUT_S:g} s")
        except Exception as error:
            trial.tally.lose(f"number {number}, {chosen.__name__}: {error!r}")

    with (
        trial.background(users=2) as background,
        ThreadPoolExecutor(_THREADS, thread_name_prefix="garbage") as pool,
    ):
        list(pool.map(attack, range(trial.times(_REQUESTS))))
        background.wait_for_answers(1)


def _bytes_to_http(trial: Trial, choose: random.Random) -> None:
    start = choose.choice((b"", b"GET / HTTP/1.1\r\n", f"POST /v2/models/{trial.model}/generate HTTP/1.1\r\n".encode()))
    _send_bytes(trial, trial.address.http_port, start + choose.randbytes(choose.randrange(1, 2000)))


def _bytes_to_grpc(trial: Trial, choose: random.Random) -> None:
    # The second is how HTTP/2 begins, so that the bytes are read as frames.
    start = choose.choice((b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
    _send_bytes(trial, trial.address.grpc_port, start + choose.randbytes(choose.randrange(1, 2000)))


def _send_bytes(trial: Trial, port: int, data: bytes) -> None:
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=_TIMEOUT_S) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(1 << 16):
                answer += part
        except (ConnectionResetError, BrokenPipeError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
    if b" 200 " in answer[:20]:
        trial.tally.lose(f"random bytes were answered with {answer[:80]!r}")
    else:
        trial.tally.refuse("connection_closed")


def _json(trial: Trial, choose: random.Random) -> None:
    body, valid = _random_body(choose)
    action = choose.choice(("generate", "generate_stream"))
    connection = http.client.HTTPConnection("127.0.0.1", trial.address.http_port, timeout=_TIMEOUT_S)
    try:
        connection.request("POST", f"/v2/models/{trial.model}/{action}", body)
        response = connection.getresponse()
        answer = response.read()
    finally:
        connection.close()
    has_image = response.status == 200 and b'"image"' in answer
    if has_image and valid:
        trial.tally.answer()
    elif has_image or valid:
        trial.tally.lose(f"{action} {body[:100]!r}: {response.status} {answer[:100]!r}")
    else:
        trial.tally.refuse(f"http_{response.status}")


def _random_body(choose: random.Random) -> tuple[bytes, bool]:
    """A body of valid JSON (but for NaN and infinities, which Python writes too), and whether it is a request."""
    kind = choose.randrange(8)
    if kind == 0:
        return json.dumps(_VALID).encode(), True
    if kind == 1:
        return json.dumps(_random_json(choose, depth=5)).encode(), False
    if kind == 2:
        depth = choose.choice((10, 1000, 10_000))  # Triton 2.51 dies of 31,000, see docs/faults.md
        opening, closing = choose.choice((("[", "]"), ('{"a":', "}")))
        return (opening * depth + "1" + closing * depth).encode(), False
    if kind == 3:
        name = choose.choice(_NUMBERS)
        number: Any = choose.choice(
            (math.nan, math.inf, -math.inf, 10**30, -(10**30), 1e300, -1, 2.5, "7", None, [], {})
        )
        # A whole number may be written with a fraction, and guidance may be any number.
        valid = number == 2.5 and name == "guidance_scale"
        return json.dumps({**_VALID, name: number}).encode(), valid
    if kind == 4:
        unknown = "".join(choose.choice('aäß漢\U0001f355\u202e\x00 "\\') for _ in range(choose.randrange(1, 40)))
        return json.dumps({**_VALID, unknown: choose.choice((1, "x", True))}).encode(), False
    if kind == 5:
        name = choose.choice(tuple(_VALID))
        return json.dumps({**_VALID, name: [_VALID[name]] * choose.randrange(2, 5)}).encode(), False
    if kind == 6:
        without = {name: value for name, value in _VALID.items() if name != "prompt"}
        return json.dumps(without).encode(), False
    text = "".join(chr(choose.choice((choose.randrange(32, 127), choose.randrange(0xD800, 0xE000)))) for _ in range(30))
    return json.dumps({**_VALID, "sampler": text}).encode(), False


def _random_json(choose: random.Random, depth: int) -> Any:
    """Anything, but no object with a prompt."""
    if depth == 0 or choose.random() < 0.3:
        return choose.choice((None, True, False, 0, -1, 10**25, 1.5, "", "text", "\u0000", "\U0001f355" * 50))
    if choose.random() < 0.5:
        return [_random_json(choose, depth - 1) for _ in range(choose.randrange(5))]
    return {f"key{index}": _random_json(choose, depth - 1) for index in range(choose.randrange(5))}


def _messages(trial: Trial, choose: random.Random) -> None:
    """Over gRPC: names, dtypes, shapes and lengths that do not go together, and parameters of all kinds."""
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    model = trial.model if choose.random() < 0.8 else choose.choice(("", "unet", "x" * 300))
    request = service_pb2.ModelInferRequest(model_name=model)
    for _ in range(choose.randrange(4)):
        name = choose.choice(_NAMES)
        shape = [choose.choice((1, 0, -1, 2, 2**40)) for _ in range(choose.randrange(4))]
        request.inputs.add(name=name, datatype=choose.choice(_DTYPES), shape=shape)
        if choose.random() < 0.9:
            request.raw_input_contents.append(choose.randbytes(choose.choice((0, 1, 4, 8, 100))))
    for _ in range(choose.randrange(3)):
        kind, value = choose.choice(_PARAMETERS)
        setattr(request.parameters[choose.choice(_NAMES)], kind, value)
    with grpc.insecure_channel(trial.address.grpc, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            answers = list(stub.ModelStreamInfer(iter([request]), timeout=_TIMEOUT_S))
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise TimeoutError from None
            trial.tally.refuse(f"grpc_{error.code().name.lower()}")
            return
    errors = [answer for answer in answers if answer.error_message]
    if errors and len(errors) == len(answers):
        trial.tally.refuse("error_message")
    else:
        trial.tally.lose(f"{len(answers)} answers, of them {len(errors)} errors, to a message without a prompt")


CASES: Cases = {"garbage": ("10,000 requests that are none", send_garbage)}
