"""What a caller may ask for, and how it is named on the wire."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypedDict

from diffuserve.errors import InvalidRequest


class RequestFields(TypedDict, total=False):
    """Keywords of every `generate` and `stream`. A missing one, or None, means the served model's default.

    The server checks the values and says what it allows.
    """

    negative_prompt: str | None
    """What the image should not show."""
    steps: int | None
    """Denoising steps."""
    guidance_scale: float | None
    """How strongly the prompt is followed; 1 or less switches guidance off and halves the work."""
    seed: int | None
    """0 .. 2^32-1, of the first image; image i uses seed + i. None draws one."""
    width: int | None
    """Pixels, a multiple of what the model needs."""
    height: int | None
    """Pixels, a multiple of what the model needs."""
    sampler: str | None
    """Name of a sampler."""
    num_images: int | None
    """Images drawn from the prompt; None means one."""
    priority: int | None
    """0 (first) .. 9 (last)."""
    client_id: str | None
    """Whose request it is, for a fair share of the server among clients."""
    timeout_s: float | None
    """Seconds after which the server gives the request up; None means never."""
    format: str | None
    """png, jpeg, webp, or raw (uncompressed RGB); None means png."""


def wire_fields(prompt: str, fields: Mapping[str, Any], *, progress: bool, preview: int) -> dict[str, Any]:
    """The request's fields by their names on the wire, those that are None left out.

    Args:
        prompt: any text.
        fields: as in `RequestFields`.
        progress: whether the server sends an event for every step.
        preview: k for a small image with every k-th step; 0 or False means none, True every step.

    Raises:
        TypeError: a keyword is unknown.
        InvalidRequest: `timeout_s` is no positive number.
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
