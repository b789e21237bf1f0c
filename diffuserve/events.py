"""What a request's coroutine says on its way, and the same as named values, whatever carries them: the names and kinds of
`diffuserve.response_tensors.RESPONSE`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffuserve.request import TextToImageRequest


@dataclass(frozen=True)
class Accepted:
    """The request has been checked and waits for its first step, `position` requests before it. Sent at once, and again
    every `REPORT_WAITING_S` while it waits, so that a client sees that the server lives, and the server sees when an
    HTTP client has gone."""

    steps: int
    position: int


@dataclass(frozen=True)
class Progressed:
    """All images of the request have done `step` of `steps`; `eta_s`: seconds that the remaining steps will take at the
    speed of those done; `previews` are small PNG files, one per image, or none, as always where there is a safety checker."""

    step: int
    steps: int
    eta_s: float
    previews: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Completed:
    """The finished request.

    `images`: one file per image in the request's format (raw: H x W x 3 bytes, row by row); `pixels`: (n, H, W, 3) uint8;
    `flagged`: whether the safety checker withheld an image, which then is black; `parameters`: what drew each image, as
    text; `queue_s`: from arrival to admission to the batch; `denoise_s`: from there to the last step; `total_s`: from arrival to
    this event.
    """

    images: tuple[bytes, ...]
    pixels: NDArray[np.uint8] = field(repr=False)
    flagged: tuple[bool, ...]
    seeds: tuple[int, ...]
    parameters: tuple[str, ...]
    warnings: tuple[str, ...]
    queue_s: float
    denoise_s: float
    total_s: float


Event = Accepted | Progressed | Completed


def values_from_event(event: Event, request: TextToImageRequest) -> dict[str, list[Any]]:
    """Lists by name of `diffuserve.response_tensors.RESPONSE`, those that an event does not have left out; text and files are
    bytes."""
    if isinstance(event, Accepted):
        return {"event": [b"accepted"], "step": [0], "steps": [event.steps], "position": [event.position]}
    if isinstance(event, Progressed):
        values: dict[str, list[Any]] = {
            "event": [b"progress"],
            "step": [event.step],
            "steps": [event.steps],
            "eta_s": [event.eta_s],
        }
        return {**values, "preview": list(event.previews)} if event.previews else values
    return {
        "event": [b"completed"],
        "step": [request.steps],
        "steps": [request.steps],
        "image": list(event.images),
        "flagged": list(event.flagged),
        "seed": list(event.seeds),
        "width": [request.width],
        "height": [request.height],
        "parameters": [text.encode() for text in event.parameters],
        "warnings": [text.encode() for text in event.warnings],
        "queue_s": [event.queue_s],
        "denoise_s": [event.denoise_s],
        "total_s": [event.total_s],
    }
