"""What a server says of itself when it is asked, so that nobody has to repeat it elsewhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec

from diffuserve import __version__
from diffuserve.bundle.manifest import Manifest
from diffuserve.limits import Limits
from diffuserve.request import FIELDS
from diffuserve.request_fields import FieldDescription
from diffuserve.wire import WIRE_VERSION


class Description(msgspec.Struct, frozen=True):
    """What one server offers.

    Attributes:
        model: the bundle's name, with the LoRAs in its weights.
        family: such as stable-diffusion-xl.
        bundle_sha256: of the bundle's files, in hex.
        safety_checker: whether every image is checked before it is sent.
        server_version: diffuserve's.
        wire_version: as of `diffuserve.wire.WIRE_VERSION`.
        fields: what a request takes, by name: type, default, bounds, choices. `fields["sampler"].enum` are the samplers.
        limits: what the server accepts, by name of `diffuserve.limits.Limits`.
    """

    model: str
    family: str
    bundle_sha256: str
    safety_checker: bool
    server_version: str
    wire_version: int
    fields: dict[str, FieldDescription]
    limits: dict[str, int | float]


def describe(manifest: Manifest, limits: Limits) -> Description:
    """The description of a server of this bundle with these limits."""
    return Description(
        model=manifest.title,
        family=manifest.model.family,
        bundle_sha256=manifest.bundle_sha256,
        safety_checker=manifest.has_safety_checker,
        server_version=__version__,
        wire_version=WIRE_VERSION,
        fields={name: field.describe(manifest.model, limits) for name, field in FIELDS.items()},
        limits=dataclasses.asdict(limits),
    )


def values_from_description(description: Description) -> dict[str, list[Any]]:
    """Lists by name of `diffuserve.response_tensors.RESPONSE`, as of an event."""
    return {"event": [b"description"], "description": [msgspec.json.encode(description)]}


def description_from_json(text: bytes) -> Description:
    """Raises ValueError if it is none. What only a newer server says is passed over."""
    try:
        return msgspec.json.decode(text, type=Description)
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from error
