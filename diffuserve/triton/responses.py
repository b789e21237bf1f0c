"""The pipeline's events as output tensors."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffuserve.events import Event, values_from_event
from diffuserve.request import TextToImageRequest
from diffuserve.response_tensors import FILES, RESPONSE
from diffuserve.tensors import NUMPY_DTYPE

_DTYPES = {spec.name: NUMPY_DTYPE[spec.dtype] for spec in RESPONSE}


def tensors_from_event(event: Event, request: TextToImageRequest) -> dict[str, NDArray[Any]]:
    """Arrays by name of `diffuserve.response_tensors.RESPONSE`; those that an event does not have are left out.

    With the encoding base64, image files and previews are ASCII text, which Triton can put into JSON as it is.
    """
    values = values_from_event(event, request)
    if request.encoding == "base64":
        for name in FILES & values.keys():
            values[name] = [base64.b64encode(file) for file in values[name]]
    return tensors_from_values(values)


def tensors_from_values(values: Mapping[str, list[Any]]) -> dict[str, NDArray[Any]]:
    """Arrays of lists of Python's values, by name of `diffuserve.response_tensors.RESPONSE`."""
    return {name: np.array(value, _DTYPES[name]) for name, value in values.items()}
