"""The pipeline's events as named values, whatever carries them: the names and kinds of `diffuserve.tensors.RESPONSE`."""

from __future__ import annotations

from typing import Any

from diffuserve.pipeline import Accepted, Event, Progress
from diffuserve.request import TextToImageRequest


def values_from_event(event: Event, request: TextToImageRequest) -> dict[str, list[Any]]:
    """Lists by name of `diffuserve.tensors.RESPONSE`, those that an event does not have left out; text and files are
    bytes."""
    if isinstance(event, Accepted):
        return {"event": [b"accepted"], "step": [0], "steps": [event.steps], "position": [event.position]}
    if isinstance(event, Progress):
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
