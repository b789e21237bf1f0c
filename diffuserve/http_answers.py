"""What a request is answered with over HTTP: an image file, or JSON, with status and headers."""

from __future__ import annotations

import base64
import http
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffuserve.description import Description, values_from_description
from diffuserve.errors import (
    Cancelled,
    DeadlineExceeded,
    DiffuserveError,
    Draining,
    InvalidRequest,
    QueueFull,
    StageFailed,
    to_wire,
)
from diffuserve.events import Completed, Event, values_from_event
from diffuserve.request import TextToImageRequest
from diffuserve.response_tensors import FILES, RESPONSE

MEDIA_TYPES = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "raw": "application/octet-stream",
}
# Any other error is 500.
HTTP_STATUS: dict[type[DiffuserveError], int] = {
    InvalidRequest: 400,
    Cancelled: 499,
    StageFailed: 500,
    QueueFull: 503,
    Draining: 503,
    DeadlineExceeded: 504,
}
_LISTS = {spec.name for spec in RESPONSE if spec.dims == (-1,)}


@dataclass(frozen=True)
class Answer:
    """`status`: HTTP's; `headers`: besides the content's type."""

    body: bytes
    media_type: str
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """HTTP's words for the status."""
        try:
            return http.HTTPStatus(self.status).phrase
        except ValueError:  # 499, which is not in the standard
            return "Client Closed Request"


def answer_from_completed(completed: Completed, request: TextToImageRequest) -> Answer:
    """The image's file, if there is one and the encoding is binary; else JSON with the fields of
    `diffuserve.response_tensors.RESPONSE`, images as base64."""
    if len(completed.images) == 1 and request.encoding == "binary":
        return Answer(completed.images[0], MEDIA_TYPES[request.format])
    return Answer(json_from_event(completed, request), "application/json")


def answer_from_description(description: Description) -> Answer:
    return Answer(_json(values_from_description(description)), "application/json")


def answer_from_error(error: DiffuserveError) -> Answer:
    """JSON with `code`, which is HTTP's, `type` and `message`, as in TorchServe's own errors; the message begins with our
    code, which `from_wire` reads. `Retry-After` is in whole seconds."""
    status = HTTP_STATUS.get(type(error), 500)
    body = json.dumps({"code": status, "type": type(error).__name__, "message": to_wire(error)}).encode()
    headers = {"Retry-After": str(math.ceil(error.retry_after_s))} if isinstance(error, QueueFull) else {}
    return Answer(body, "application/json", status, headers)


def json_from_event(event: Event, request: TextToImageRequest) -> bytes:
    """The event's values by name: a list for those of which there may be several, files as base64."""
    return _json(values_from_event(event, request))


def _json(values: Mapping[str, list[Any]]) -> bytes:
    items = {name: [_for_json(name, item) for item in value] for name, value in values.items()}
    return json.dumps({name: value if name in _LISTS else value[0] for name, value in items.items()}).encode()


def _for_json(name: str, item: Any) -> Any:
    if name in FILES:
        return base64.b64encode(item).decode()
    return item.decode() if isinstance(item, bytes) else item
