"""The HTTP transport against a server that answers as it is told."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from diffuserve.errors import DiffuserveError, InvalidRequest, QueueFull
from diffuserve_loadtest.sending.http_transport import HttpTransport
from diffuserve_loadtest.sending.target import Protocol, Target
from diffuserve_loadtest.sending.transport import Answer, TransportFailed
from diffuserve_loadtest.workload.arrivals import Closed
from diffuserve_loadtest.workload.plan import plan
from diffuserve_loadtest.workload.workload import Requests, Workload

REQUEST = plan(Workload("A test.", Closed(1), (Requests(steps=3),)), 7)
IMAGE = b"\xff an image"
TEXT = base64.b64encode(IMAGE).decode()


@contextmanager
def server(status: int, content_type: str, body: bytes) -> Iterator[tuple[str, list[tuple[str, Any, Any]]]]:
    """Its address, and the requests that came: path, headers and fields."""
    came: list[tuple[str, Any, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            fields = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            came.append((self.path, self.headers, fields))
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Location", "http://example.com/")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}", came
        finally:
            http.shutdown()
            thread.join()


def send(protocol: Protocol, url: str, token: str | None = None, **target: str) -> Answer:
    return HttpTransport(Target(protocol, url, token, **target), 8).send(REQUEST)


@pytest.mark.parametrize(
    ("protocol", "content_type", "body", "path"),
    [
        ("triton-http", "application/json", json.dumps({"image": TEXT}), "/v2/models/stable_diffusion/generate"),
        (
            "triton-stream",
            "text/event-stream",
            'data: {"event": "step"}\n\ndata: ' + json.dumps({"image": TEXT}) + "\n\n",
            "/v2/models/stable_diffusion/generate_stream",
        ),
        ("torchserve-http", "application/json", json.dumps({"image": [TEXT]}), "/predictions/stable_diffusion"),
        ("torchserve-http", "image/png", IMAGE, "/predictions/stable_diffusion"),
        ("image-http", "image/png", IMAGE, "/"),
    ],
)
def test_the_image_arrives_by_every_protocol(
    protocol: Protocol, content_type: str, body: str | bytes, path: str
) -> None:
    content = body.encode() if isinstance(body, str) else body
    with server(200, content_type, content) as (url, came):
        answer = send(protocol, url, token="secret")  # noqa: S106
    assert answer.files == [IMAGE]
    assert 0 < answer.size_bytes <= len(content)
    [(asked, headers, fields)] = came
    assert asked == path
    assert headers["Authorization"] == "Bearer secret"
    progress = {"progress": True} if protocol == "triton-stream" else {}
    assert fields == {**REQUEST.fields, **progress}


@pytest.mark.parametrize(
    ("protocol", "path"),
    [("triton-http", "/v2/models/photos/generate"), ("torchserve-http", "/predictions/photos")],
)
def test_the_model_is_in_the_path(protocol: Protocol, path: str) -> None:
    with server(200, "application/json", json.dumps({"image": TEXT}).encode()) as (url, came):
        send(protocol, url, model="photos")
    assert [asked for asked, _, _ in came] == [path]


def test_several_images_arrive_together() -> None:
    with server(200, "application/json", json.dumps({"image": [TEXT, TEXT]}).encode()) as (url, _):
        assert send("torchserve-http", url).files == [IMAGE, IMAGE]


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (400, '{"error": "[invalid_request] steps is 0"}', InvalidRequest("steps is 0")),
        (503, '{"code": 503, "message": "[queue_full retry_after_s=2] much waits"}', QueueFull("much waits")),
        (503, "[queue_full retry_after_s=2] much waits", QueueFull("much waits")),
        (200, '{"error": "[queue_full retry_after_s=2] much waits"}', QueueFull("much waits")),
    ],
)
def test_an_error_of_ours_is_known_wherever_it_stands(status: int, body: str, error: DiffuserveError) -> None:
    with server(status, "application/json", body.encode()) as (url, _), pytest.raises(type(error)) as raised:
        send("triton-http", url)
    assert str(raised.value) == str(error)


@pytest.mark.parametrize(
    ("status", "body", "outcome"),
    [
        (500, "", "http_500"),
        (404, '{"error": "no such model"}', "http_404"),
        (302, "", "http_302"),  # and nothing was sent to where it points
        (200, "no JSON", "wrong_image"),
        (200, "{}", "wrong_image"),
    ],
)
def test_other_failures_are_told_apart(status: int, body: str, outcome: str) -> None:
    with server(status, "text/plain", body.encode()) as (url, _), pytest.raises(TransportFailed) as raised:
        send("triton-http", url)
    assert raised.value.outcome == outcome


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 500 No\r\nContent-Length: 99\r\n\r\n{"])
def test_a_connection_that_breaks_is_told_as_that(begun: bytes) -> None:
    def hang_up() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(begun)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=hang_up)
        thread.start()
        with pytest.raises(TransportFailed) as raised:
            send("triton-http", f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    assert raised.value.outcome == "connection"
