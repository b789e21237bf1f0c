"""The pipeline's events as output tensors."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffuserve.pipeline import Accepted, Completed, Event, Progress
from diffuserve.request import TextToImageRequest
from diffuserve.tensors import NUMPY_DTYPE, RESPONSE

_DTYPES = {spec.name: NUMPY_DTYPE[spec.dtype] for spec in RESPONSE}


def tensors_from_event(event: Event, request: TextToImageRequest) -> dict[str, NDArray[Any]]:
    """Arrays by name of `diffuserve.tensors.RESPONSE`; those that an event does not have are left out.

    With the encoding base64, image files and previews are ASCII text, which Triton can put into JSON as it is.
    """
    values: dict[str, Iterable[Any]]
    if isinstance(event, Accepted):
        values = {"event": [b"accepted"], "step": [0], "steps": [event.steps], "position": [event.position]}
    elif isinstance(event, Progress):
        values = {"event": [b"progress"], "step": [event.step], "steps": [event.steps], "eta_s": [event.eta_s]}
        if event.previews:
            values["preview"] = _encoded(event.previews, request)
    elif isinstance(event, Completed):
        values = {
            "event": [b"completed"],
            "step": [request.steps],
            "steps": [request.steps],
            "image": _encoded(event.images, request),
            "flagged": event.flagged,
            "seed": event.seeds,
            "width": [request.width],
            "height": [request.height],
            "parameters": [text.encode() for text in event.parameters],
            "warnings": [text.encode() for text in event.warnings],
            "queue_s": [event.queue_s],
            "denoise_s": [event.denoise_s],
            "total_s": [event.total_s],
        }
    return {name: np.array(list(value), _DTYPES[name]) for name, value in values.items()}


def _encoded(files: Iterable[bytes], request: TextToImageRequest) -> list[bytes]:
    return [base64.b64encode(file) for file in files] if request.encoding == "base64" else list(files)
