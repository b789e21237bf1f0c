"""Triton's generate and generate_stream, TorchServe's predictions, and servers that answer JSON with an image."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from diffuserve.errors import from_wire
from diffuserve_loadtest.sending.target import Target
from diffuserve_loadtest.sending.transport import Answer, TransportFailed
from diffuserve_loadtest.workload.plan import PlannedRequest

_CONNECT_TIMEOUT_S = 5.0
_MESSAGE_BYTES = _CHUNK_BYTES = 65536


class HttpTransport:
    """One connection for each request in flight, kept alive. How long an answer may take is the caller's concern, unless
    `timeout_s` says how long the server may be silent."""

    def __init__(self, target: Target, max_in_flight: int, *, timeout_s: float | None = None) -> None:
        self._timeout_s = timeout_s
        path, self._extra, self._read = _PROTOCOLS[target.protocol]
        self._url = target.url.rstrip("/") + path.format(model=target.model)
        self._session = requests.Session()
        self._session.trust_env = False  # no proxies: the server is the one at the address
        self._session.mount("http://", HTTPAdapter(pool_connections=1, pool_maxsize=max_in_flight))
        if target.token is not None:
            self._session.headers["Authorization"] = f"Bearer {target.token}"

    def send(self, request: PlannedRequest) -> Answer:
        body = json.dumps({**request.fields, **self._extra})
        headers = {"Content-Type": "application/json"}
        try:
            with self._session.post(
                self._url,
                body,
                headers=headers,
                stream=True,
                timeout=(_CONNECT_TIMEOUT_S, self._timeout_s),
                allow_redirects=False,  # a load stays on this machine
            ) as response:
                if response.status_code != 200:
                    raise _error(response.status_code, next(response.iter_content(_MESSAGE_BYTES), b""))
                return self._read(response)
        except requests.RequestException as error:
            raise TransportFailed("connection", f"{type(error).__name__}: {error}") from error


def _error(status: int, body: bytes) -> Exception:
    """The server's own error, if the body carries one; Triton and TorchServe put it into JSON."""
    text = body.decode(errors="replace")
    with contextlib.suppress(ValueError):
        fields = json.loads(text)
        if isinstance(fields, dict):
            text = str(fields.get("error") or fields.get("message") or text)
    return from_wire(text) or TransportFailed(f"http_{status}", text)


def _images(response: requests.Response) -> Answer:
    body = response.content
    return Answer([body], len(body))


def _json(response: requests.Response) -> Answer:
    return _answer_from(response.content, len(response.content))


def _image_or_json(response: requests.Response) -> Answer:
    """TorchServe's handler sends one image as it is, several in JSON."""
    return _json(response) if response.headers.get("Content-Type") == "application/json" else _images(response)


def _events(response: requests.Response) -> Answer:
    """Server-sent events, each one line `data: JSON` and an empty one; the last one has the images."""
    size_bytes, last = 0, b""
    for line in response.iter_lines(chunk_size=_CHUNK_BYTES):
        size_bytes += len(line)
        if line.startswith(b"data:"):
            last = line.removeprefix(b"data:")
    return _answer_from(last, size_bytes)


def _answer_from(text: bytes, size_bytes: int) -> Answer:
    try:
        fields = json.loads(text)
        if "error" in fields:
            raise _error(200, str(fields["error"]).encode())
        images = fields["image"]
        files = [base64.b64decode(image) for image in (images if isinstance(images, list) else [images])]
    except (ValueError, KeyError, TypeError) as error:
        raise TransportFailed("wrong_image", f"the answer has no images ({type(error).__name__}: {error})") from None
    return Answer(files, size_bytes)


# protocol: (path, fields beside the request's own, how to read an answer)
_PROTOCOLS: dict[str, tuple[str, dict[str, Any], Callable[[requests.Response], Answer]]] = {
    "triton-http": ("/v2/models/{model}/generate", {}, _json),
    "triton-stream": ("/v2/models/{model}/generate_stream", {"progress": True}, _events),
    "torchserve-http": ("/predictions/{model}", {}, _image_or_json),
    "image-http": ("", {}, _images),
}
