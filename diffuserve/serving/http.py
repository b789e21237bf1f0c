"""HTTP to a server that this machine runs, never through a proxy: `http_proxy` is meant for what is elsewhere, and the keys of
a server are nobody else's business."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPResponse

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def open_url(
    url: str, *, timeout_s: float, data: bytes | None = None, headers: Mapping[str, str] | None = None
) -> HTTPResponse:
    """A GET, or a POST of `data`; what comes back is a context manager, to be read.

    Raises:
        urllib.error.HTTPError: the server answered with an error; an `OSError`.
        OSError: nothing answers, or not within `timeout_s` seconds.
    """
    request = urllib.request.Request(url, data, dict(headers or {}))  # noqa: S310 - a server's own address
    response: HTTPResponse = _OPENER.open(request, timeout=timeout_s)
    return response


def answers_ok(url: str) -> bool:
    """Whether a server answers a GET of its own `url` with 200 within a second."""
    return answer_of(url) is not None


def answer_of(url: str, headers: Mapping[str, str] | None = None) -> bytes | None:
    """What a server answers to a GET of its own `url`; None if it is not 200 or takes longer than a second."""
    try:
        with open_url(url, timeout_s=1, headers=headers) as response:
            return response.read() if response.status == 200 else None
    except urllib.error.HTTPError as error:
        error.close()
    except OSError:
        pass
    return None
