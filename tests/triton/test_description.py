"""What a real server says of itself, by every way to ask it, and what it says to clients of other versions."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffuserve.bundle.manifest import read_manifest
from diffuserve.description import Description, describe, description_from_json
from diffuserve.errors import InvalidRequest
from diffuserve.limits import Limits
from diffuserve.triton.launcher import TritonServer
from diffuserve.wire import WIRE_VERSION
from diffuserve_client import AsyncClient, Client
from diffuserve_client import exchange as exchanges
from tests.triton.test_bad_requests import PROMPT, error_of
from tests.triton.test_http import post
from tests.waiting import LONG_S


@pytest.fixture(scope="module")
def expected(bundle: Path) -> Description:
    manifest = read_manifest(bundle)
    return describe(manifest, Limits.for_model(manifest.model))


def test_over_grpc(server: TritonServer, client: Client, expected: Description) -> None:
    assert client.describe() == expected

    async def ask() -> Description:
        async with AsyncClient(server.address.grpc) as other:
            return await other.describe()

    assert asyncio.run(ask()) == expected


@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
def test_over_http(server: TritonServer, expected: Description, endpoint: str) -> None:
    status, text = post(server, endpoint, {"describe": True})
    answer = json.loads(text.removeprefix("data: "))
    assert status == 200
    assert answer.keys() - {"model_name", "model_version"} == {"event", "description"}
    assert answer["event"] == "description"
    assert description_from_json(answer["description"].encode()) == expected


def test_an_older_client_that_sends_no_version_is_served(server: TritonServer) -> None:
    small = {name: ("int64_param", value) for name, value in (("steps", 1), ("width", 32), ("height", 32))}
    assert error_of(server, [PROMPT], **small) == ""
    assert error_of(server, [PROMPT], **small, wire_version=("int64_param", WIRE_VERSION)) == ""


def test_a_client_of_another_version_is_told_both(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchanges, "WIRE_VERSION", 99)
    words = f"The client speaks version 99 of the wire, and the server version {WIRE_VERSION}"
    with pytest.raises(InvalidRequest, match=words):
        client.generate("a cat", steps=1)
    assert client.describe().wire_version == WIRE_VERSION  # whoever asks is told


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ({"describe": 1}, "describe is 1; it must be true or false"),
        ({"wire_version": 1.5}, "wire_version is 1.5; it must"),
    ],
)
def test_neither_is_taken_for_another_value(server: TritonServer, sent: dict[str, Any], words: str) -> None:
    status, text = post(server, "generate", {"prompt": "a cat", **sent})
    assert status == 400
    assert words in text


def test_the_documented_code(server: TritonServer) -> None:
    docs = (Path(__file__).parents[2] / "docs" / "client.md").read_text()
    [code] = re.findall(r"^```python\n(.*?)^```$", docs, re.MULTILINE | re.DOTALL)
    code = code.replace("localhost:8001", server.address.grpc)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LONG_S)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("tiny-emoji ")
    assert "steps: 20 by default, at most 150" in done.stdout
