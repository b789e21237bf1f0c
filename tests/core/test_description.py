"""What a server says of itself is what it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from diffuserve import __version__
from diffuserve.bundle.manifest import FusedLora
from diffuserve.description import Description, describe, description_from_json, values_from_description
from diffuserve.errors import InvalidRequest
from diffuserve.limits import Limits
from diffuserve.request import FIELDS, request_from_fields
from diffuserve.samplers import SAMPLERS
from diffuserve.wire import WIRE_VERSION, request_from_wire
from tests.core.fakes import MODEL, make_bundle

LIMITS = Limits(max_steps=5, max_side_px=60, max_guidance_scale=9.5, max_images=4, max_prompt_bytes=12)


@pytest.fixture(scope="module")
def description(tmp_path_factory: pytest.TempPathFactory) -> Description:
    return describe(make_bundle(tmp_path_factory.mktemp("bundle")), LIMITS)


def accepts(name: str, value: Any) -> bool:
    try:
        request = request_from_fields({"prompt": "", name: value}, MODEL, LIMITS)
    except InvalidRequest:
        return False
    assert getattr(request, name) == value
    return True


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_is_as_it_says(description: Description, name: str) -> None:
    field = description.fields[name]
    if name not in ("prompt", "seed"):
        assert getattr(request_from_fields({"prompt": ""}, MODEL, LIMITS), name) == field.default
    step = field.multiple_of or 1
    if field.minimum is not None and field.maximum is not None:
        assert accepts(name, field.minimum) and accepts(name, field.maximum)
        assert not accepts(name, field.minimum - step) and not accepts(name, field.maximum + step)
    if field.multiple_of is not None:
        assert not accepts(name, field.multiple_of + 1)
    if field.enum is not None:
        assert all(accepts(name, choice) for choice in field.enum)
        assert not accepts(name, "other")
    if field.max_bytes is not None:
        assert accepts(name, "a" * field.max_bytes)
        assert not accepts(name, "a" * (field.max_bytes + 1))
    kinds = {"string": "text", "integer": 1, "number": 1.0, "boolean": True}
    assert isinstance(field.default, (type(kinds[field.type]), type(None)))


def test_what_it_says_in_all(description: Description) -> None:
    assert description.fields.keys() == FIELDS.keys()
    # Both are cut to what the server allows.
    assert (description.fields["steps"].default, description.fields["width"].default) == (5, 48)
    assert (description.fields["steps"].maximum, description.fields["width"].maximum) == (5, 48)
    assert description.fields["width"].multiple_of == 16
    assert description.fields["sampler"].enum == tuple(SAMPLERS)
    assert description.fields["sampler"].default == "euler"
    assert description.limits["max_images"] == 4
    assert (description.server_version, description.wire_version) == (__version__, WIRE_VERSION)
    assert (description.model, description.family, description.safety_checker) == ("fake", "stable-diffusion", False)


def test_the_loras_and_the_safety_checker_are_told(tmp_path: Path) -> None:
    manifest = make_bundle(tmp_path, safety_checker=True, loras=(FusedLora("style", 0.5, "ab" * 32),))
    told = describe(manifest, LIMITS)
    assert (told.model, told.safety_checker, told.bundle_sha256) == (
        "fake with style 0.5",
        True,
        manifest.bundle_sha256,
    )


def test_it_comes_back_from_json_in_the_words_of_json_schema(description: Description) -> None:
    [text] = values_from_description(description)["description"]
    assert description_from_json(text) == description
    width = msgspec.json.decode(text)["fields"]["width"]
    assert width == {
        "type": "integer",
        "description": FIELDS["width"].help,
        "default": 48,
        "minimum": 16,
        "maximum": 48,
        "multipleOf": 16,
    }


def test_what_is_no_description_is_refused() -> None:
    for text in (b"", b"{}", b"[]"):
        with pytest.raises(ValueError, match=r"."):
            description_from_json(text)


def test_the_wire() -> None:
    def request(**sent: Any) -> Any:
        return request_from_wire(sent, MODEL, LIMITS)

    drawn = request(prompt="a", seed=1)
    assert drawn is not None and drawn.prompt == "a"
    assert request(prompt="a", seed=1, wire_version=WIRE_VERSION, describe=False) == drawn
    assert request(prompt="a", seed=1, wire_version=None, describe=None) == drawn
    for others in ({}, {"prompt": "a", "steps": 0, "colour": "red"}, {"wire_version": WIRE_VERSION + 1}):
        assert request(describe=True, **others) is None
    for version in (0, WIRE_VERSION + 1):
        with pytest.raises(InvalidRequest) as caught:
            request(prompt="a", wire_version=version)
        assert str(caught.value) == (
            f"The client speaks version {version} of the wire, and the server version {WIRE_VERSION}. "
            f"Use the client of the server's version, diffuserve {__version__}."
        )
    for wrong, words in (
        ({"wire_version": "1"}, "wire_version is '1'"),
        ({"describe": 1}, "describe is 1; it must be true"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            request(prompt="a", **wrong)
