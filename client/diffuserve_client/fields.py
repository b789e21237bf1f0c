"""What a caller asks for, by its names on the wire."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from diffuserve.errors import InvalidRequest
from diffuserve.request import RequestFields


def wire_fields(prompt: str, fields: Mapping[str, Any], *, progress: bool, preview: int) -> dict[str, Any]:
    """The request's fields by their names on the wire, those that are None left out.

    Args:
        prompt: any text.
        fields: as in `diffuserve.request.RequestFields`.
        progress: whether the server sends an event for every step.
        preview: k for a small image with every k-th step; 0 or False means none, True every step.

    Raises:
        TypeError: a keyword is unknown.
        InvalidRequest: `timeout_s` is not a positive number.
    """
    known = RequestFields.__annotations__
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise TypeError(f"unknown keyword {', '.join(unknown)}; a request takes {', '.join(known)}")
    every = int(preview) if isinstance(preview, bool) else preview
    wire = {"prompt": prompt, **fields, "progress": progress or None, "preview": every or None}
    timeout_s = wire.pop("timeout_s", None)
    if timeout_s is not None:
        wire["timeout_ms"] = _milliseconds(timeout_s)
    return {name: value for name, value in wire.items() if value is not None}


def _milliseconds(timeout_s: float) -> int:
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < math.inf:
        raise InvalidRequest(
            f"timeout_s is {timeout_s!r}; it must be a positive number of seconds, or None for no limit."
        )
    return math.ceil(timeout_s * 1000)
