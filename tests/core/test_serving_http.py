"""Whatever proxy the environment names, a server's own address is asked directly."""

from __future__ import annotations

import ast
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from diffuserve.errors import StageFailed
from diffuserve.serving.http import answer_of, answers_ok
from diffuserve.triton.model_control import ModelControl
from diffuserve_loadtest.server.metrics import read_text
from tests.ports import reserved_port

ROOT = Path(__file__).parents[2]
PACKAGES = ("diffuserve", "export", "handlers", "client", "loadtest")


@contextmanager
def http_server(status: int, body: bytes) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Its URL, and method and path of every request so far."""
    came: list[tuple[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            came.append((self.command, self.path))
            self.rfile.read(int(self.headers.get("Content-Length", "0")))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815 - http.server's own name

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", came
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """What a proxy that the environment names is asked."""
    with http_server(200, b"the proxy") as (url, came):
        for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("http_proxy", url)
        yield came


def test_the_fake_proxy_would_be_asked(proxied: list[tuple[str, str]]) -> None:
    opener = urllib.request.build_opener()
    with opener.open("http://127.0.0.1:1/", timeout=60) as response:
        assert response.read() == b"the proxy"
    assert proxied == [("GET", "http://127.0.0.1:1/")]


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        (lambda url: answer_of(f"{url}/a", {"Authorization": "Bearer key"}), [("GET", "/a")]),
        (lambda url: answers_ok(f"{url}/b"), [("GET", "/b")]),
        (lambda url: read_text(f"{url}/c"), [("GET", "/c")]),
        (
            lambda url: ModelControl(url).reload("unet"),
            [("POST", f"/v2/repository/models/unet/{verb}") for verb in ("unload", "load")],
        ),
    ],
    ids=["answer_of", "answers_ok", "read_text", "reload"],
)
def test_no_proxy_is_asked(
    proxied: list[tuple[str, str]], ask: Callable[[str], object], expected: list[tuple[str, str]]
) -> None:
    with http_server(200, b"itself") as (url, came):
        assert ask(url) in (b"itself", "itself", True, None)
    assert came == expected
    assert not proxied


def test_what_is_no_answer() -> None:
    with http_server(503, b"loading") as (url, _):
        assert answer_of(url) is None
        assert not answers_ok(url)
        with pytest.raises(StageFailed, match="Triton could not unload unet: loading"):
            ModelControl(url).reload("unet")
    assert answer_of(f"http://127.0.0.1:{reserved_port()}") is None


def test_there_is_one_place_that_opens_urls() -> None:
    """Who calls urllib's own functions obeys `http_proxy`."""
    openers = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("urlopen", "build_opener", "urlretrieve")
    }
    assert openers == {"diffuserve/serving/http.py"}
