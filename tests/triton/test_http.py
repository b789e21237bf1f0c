"""The same model over Triton's own HTTP endpoints, as curl uses them."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffuserve.response_tensors import RESPONSE
from diffuserve.triton.launcher import TritonServer
from diffuserve_client import Client
from tests.gate import Gate
from tests.metrics import counted, values, waiting_and_running
from tests.waiting import LONG_S, wait_for, wait_until


def post(server: TritonServer, endpoint: str, body: Any, model: str = "stable_diffusion") -> tuple[int, str]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    url = f"{server.address.http}/v2/models/{model}/{endpoint}"
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=LONG_S) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_generate_returns_one_json_with_the_image_in_base64(server: TritonServer) -> None:
    status, text = post(server, "generate", {"prompt": "a slice of pizza", "seed": 7, "steps": 5})
    answer = json.loads(text)
    assert status == 200
    assert answer["seed"] == 7
    assert answer["event"] == "completed"
    image = Image.open(io.BytesIO(base64.b64decode(answer["image"])))
    assert (image.format, image.size) == ("PNG", (128, 128))


def test_an_id_that_is_not_utf8_is_refused(server: TritonServer) -> None:
    """Nobody would answer it if the log could not tell it."""
    status, text = post(server, "generate", b'{"prompt": "an apple", "id": "\xff\xfe"}')
    assert status == 400
    assert "[invalid_request] The request has text that is not UTF-8" in text


def test_warnings_come_as_a_list(server: TritonServer) -> None:
    answer = json.loads(post(server, "generate", {"prompt": 'a [cat|dog] AND "a [house:tree:3]"', "steps": 1})[1])
    assert len(answer["warnings"]) == 3
    assert all(warning.startswith("Drawn as text: the prompt has ") for warning in answer["warnings"])
    # The settings as they stand in the image, too.
    assert answer["parameters"].startswith('a [cat|dog] AND "a [house:tree:3]"\nSteps: 1, ')


def test_generate_stream_sends_progress_as_server_sent_events(server: TritonServer) -> None:
    status, text = post(server, "generate_stream", {"prompt": "a rocket", "steps": 4, "progress": True, "preview": 2})
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    assert status == 200
    assert [event["event"] for event in events] == ["accepted"] + ["progress"] * 4 + ["completed"]
    assert base64.b64decode(events[2]["preview"]).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": "x", "steps": 0}, "steps is 0; it must be from 1 to 150"),
        ({"prompt": "x", "colour": "red"}, "Unknown: 'colour'"),
        ({"prompt": "x", "width": 100}, "Nearest: 96 or 128"),
        ({"steps": 5}, "prompt"),
    ],
)
def test_a_bad_body_is_answered_with_400_and_the_reason(server: TritonServer, body: Any, words: str) -> None:
    status, text = post(server, "generate", body)
    assert status == 400
    assert words in text


def test_a_body_that_is_no_json_is_an_error(server: TritonServer) -> None:
    status, text = post(server, "generate", b"{not json")
    assert status >= 400  # Triton's own choice is 500
    assert "JSON" in text


def test_plain_infer_is_refused(server: TritonServer) -> None:
    body = {"inputs": [{"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["x"]}]}
    status, text = post(server, "infer", body)
    assert status >= 400
    assert "decoupled" in text


def test_a_connection_closed_in_the_middle_frees_the_rows(server: TritonServer, client: Client, gate: Gate) -> None:
    def noticed() -> bool:
        return values(server.address)["requests_cancelled"] > before

    steps = 150
    body = json.dumps({"prompt": "a rocket", "steps": steps, "num_images": 4, "progress": True}).encode()
    head = (
        f"POST /v2/models/stable_diffusion/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    before = counted(server.address, client, gate)["requests_cancelled"]
    for _ in range(5):  # Triton 2.51 misses a reset now and then, and draws that request to its end
        with gate.closed(after=1):
            with socket.create_connection((server.address.host, server.address.http_port)) as connection:
                connection.sendall(head.encode() + body)
                received = b""
                while b'"progress"' not in received:  # `accepted` came at once, and a step is done
                    received += connection.recv(4096)
                assert b'"accepted"' in received
            # Triton notices when it sends what the next steps make; far from the last one.
            for _ in range(steps * 2 // 3):
                gate.close(after=1)
                wait_until(lambda: gate.holds or noticed())
                if noticed():
                    return
        wait_for([0, 0], lambda: waiting_and_running(server.address))
    raise AssertionError("no reset was noticed")


DOCS = (Path(__file__).parents[2] / "docs" / "http.md").read_text()


@pytest.mark.parametrize(
    ("fields", "status", "words"), re.findall(r"^\| `(\{.*\})` \| (\d+) \| `(.*)` \|$", DOCS, re.MULTILINE)
)
def test_the_documented_answers(server: TritonServer, fields: str, status: str, words: str) -> None:
    """A body that is fine but for these fields."""
    body = '{"steps": 1, "width": 32, "height": 32, '
    if '"steps"' in fields:
        body = body.replace('"steps": 1, ', "")
    if '"width"' in fields:
        body = body.replace('"width": 32, ', "")
    if '"prompt"' not in fields:
        body += '"prompt": "a cat", '
    found, answer = post(server, "generate", (body + fields.removeprefix("{")).encode())
    assert str(found) == status, answer
    said = json.loads(answer)
    assert words in (said["parameters"] if found == 200 else said["error"])


def test_what_comes_back_is_what_is_documented(server: TritonServer) -> None:
    """Each event's fields and their types, with one image and with several."""
    events = {
        name: set(re.findall(r"`(\w+)`", listed)) | {"event"}
        for name, listed in re.findall(
            r"^\| `(accepted|progress|completed|description)` \|[^|]*\| (`.*) \|$", DOCS, re.MULTILINE
        )
    }
    json_types = {
        name: kind
        for names, kind in re.findall(r"^\| (`.*`) \| ([a-z ,]+) \| [A-Z0-9]+ \[", DOCS, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", names)
    }
    python_types = {"text": str, "number": (int, float), "true or false": bool}
    assert json_types.keys() == {spec.name for spec in RESPONSE} == set().union(*events.values())
    for images in (1, 3):
        fields = {"prompt": "a [cat|dog]", "steps": 2, "width": 32, "height": 32, "num_images": images}
        asked = ({**fields, "progress": True, "preview": True}, {"describe": True})
        lines = "".join(post(server, "generate_stream", body)[1] for body in asked).splitlines()
        answers = [json.loads(line.removeprefix("data: ")) for line in lines if line]
        assert {answer["event"] for answer in answers} == events.keys()
        for answer in answers:
            assert answer.keys() - {"model_name", "model_version"} == events[answer["event"]]
            for name in events[answer["event"]]:
                kind, _, listed = json_types[name].partition(", ")
                several = bool(listed) and images > 1 and name != "warnings"  # one warning, so it is not a list
                values = answer[name] if several else [answer[name]]
                assert len(values) == (images if several else 1)
                assert all(isinstance(value, python_types[kind]) for value in values), (name, values)


@pytest.mark.parametrize(
    ("body", "steps"),
    [
        ('{"parameters": {"steps": 3}, "steps": 2', 2),
        ('{"steps": 2, "parameters": {"steps": 3}', 3),
        ('{"steps": 2, "steps": 3', 2),
        ('{"parameters": {"steps": 2, "steps": 3}', 2),
    ],
)
def test_which_of_two_values_counts(server: TritonServer, body: str, steps: int) -> None:
    _, answer = post(server, "generate", f'{body}, "prompt": "a cat", "width": 32, "height": 32}}'.encode())
    assert json.loads(answer)["steps"] == steps


def test_what_is_too_late_is_answered_with_400_too(server: TritonServer, gate: Gate) -> None:
    """As docs/http.md says: the code in brackets tells, since Triton has forgotten the status."""
    body = {"prompt": "a cat", "steps": 150, "num_images": 16, "timeout_ms": 1}
    with gate.closed():
        status, text = post(server, "generate", body)
    assert status == 400
    assert json.loads(text)["error"].startswith("[deadline_exceeded] ")


def test_the_documented_code_for_grpc_raises_the_servers_error(server: TritonServer, tmp_path: Path) -> None:
    [code] = re.findall(r"^```python\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)
    code = code.replace("localhost:8001", server.address.grpc).replace('"steps": 20', '"steps": 999')
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=LONG_S)
    assert done.returncode == 1
    assert "[invalid_request] steps is 999" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_the_documented_code_for_grpc(server: TritonServer, tmp_path: Path) -> None:
    [code] = re.findall(r"^```python\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)
    code = code.replace("localhost:8001", server.address.grpc)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=LONG_S)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "pizza.png") as image:
        assert image.size == (128, 128)
