"""What comes back: `Progress` when the request is accepted and after every step, and one `Result`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from typing import Any

from PIL import Image

from diffuserve.description import Description, description_from_json
from diffuserve.errors import StageFailed


@dataclass(frozen=True)
class Progress:
    """`step` of `steps` is done; step 0: the request has been accepted and waits, `position` requests before it.

    `eta_s`: seconds that the remaining steps will take, None while it waits.
    `encoded_previews`: small PNG files, one for each image of the request, in the steps that have them.
    """

    step: int
    steps: int
    position: int = 0
    eta_s: float | None = None
    encoded_previews: list[bytes] = field(default_factory=list, repr=False)

    @cached_property
    def previews(self) -> list[Image.Image]:
        """The previews, decoded when first asked for."""
        return [_decode(data) for data in self.encoded_previews]

    @property
    def preview(self) -> Image.Image | None:
        """The first image's preview, or None if this step has none."""
        return self.previews[0] if self.encoded_previews else None


@dataclass(frozen=True)
class Result:
    """The images of one request and how they came about.

    Attributes:
        encoded: each image as the server sent it: a file in `format`, or height * width * 3 bytes of RGB for "raw".
        format: png, jpeg, webp or raw.
        flagged: one per image, whether the safety checker withheld it: it is black then. False for all images of a model
            that has none.
        seeds: one per image; the same seed and settings give the same image.
        width, height: pixels.
        parameters: one text per image, in the form that AUTOMATIC1111's web UI reads; PNG, JPEG and WebP carry it too.
        warnings: what the server did otherwise than asked, in words.
        queue_s, denoise_s, total_s: seconds from arrival to admission to the batch, from there to the last step, and from
            arrival to the last image.
        request_id: what the server's log calls this request.
    """

    encoded: list[bytes] = field(repr=False)
    format: str
    flagged: list[bool]
    seeds: list[int]
    width: int
    height: int
    parameters: list[str]
    warnings: list[str]
    queue_s: float
    denoise_s: float
    total_s: float
    request_id: str

    @cached_property
    def images(self) -> list[Image.Image]:
        """The images, RGB, decoded when first asked for."""
        if self.format == "raw":
            return [Image.frombytes("RGB", (self.width, self.height), data) for data in self.encoded]
        return [_decode(data) for data in self.encoded]


def event_from_values(
    values: Mapping[str, list[Any]], format: str, request_id: str
) -> Progress | Result | Description | None:
    """One event of a request, or None for those that only a newer server knows.

    Args:
        values: lists by name of `diffuserve.response_tensors.RESPONSE`; text and files are bytes.
        format: what the images were asked for in.
        request_id: the request's.

    Raises:
        KeyError, IndexError, ValueError: the values are not an event of diffuserve's.
    """
    event = values["event"][0].decode()
    if event == "accepted":
        return Progress(0, values["steps"][0], position=values.get("position", [0])[0])
    if event == "progress":
        return Progress(
            values["step"][0],
            values["steps"][0],
            eta_s=values.get("eta_s", [None])[0],
            encoded_previews=values.get("preview", []),
        )
    if event == "completed":
        return Result(
            encoded=values["image"],
            format=format,
            flagged=values["flagged"],
            seeds=values["seed"],
            width=values["width"][0],
            height=values["height"][0],
            parameters=[text.decode(errors="replace") for text in values["parameters"]],
            warnings=[text.decode(errors="replace") for text in values["warnings"]],
            queue_s=values["queue_s"][0],
            denoise_s=values["denoise_s"][0],
            total_s=values["total_s"][0],
            request_id=request_id,
        )
    if event == "description":
        return description_from_json(values["description"][0])
    return None


def result_from_events(
    events: Generator[Progress | Result, None, None], on_progress: Callable[[Progress], object] | None
) -> Result:
    """Reads the events of one request to their end; an error, also one of `on_progress`, closes them."""
    result: Result | None = None
    with closing(events):
        for event in events:
            if isinstance(event, Result):
                result = event
            elif on_progress is not None:
                on_progress(event)
    if result is None:
        raise StageFailed("The request ended without an image.")
    return result


def _decode(data: bytes) -> Image.Image:
    image = Image.open(BytesIO(data))
    image.load()
    return image
