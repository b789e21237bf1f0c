"""The text-to-image request: its fields, its limits, and the one place where they are checked."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffuserve.bundle.manifest import ModelSpec
from diffuserve.errors import InvalidRequest
from diffuserve.limits import Limits
from diffuserve.samplers import SAMPLERS

MAX_SEED = 2**32 - 1  # torch's CPU generator keeps 32 bits of a seed
FORMATS = ("png", "jpeg", "webp", "raw")
ENCODINGS = ("base64", "binary")
PRIORITIES = (0, 9)
MAX_CLIENT_ID_BYTES = 128
MAX_TIMEOUT_MS = 24 * 3600 * 1000
# Of a refused value, and of unknown names, in a message.
_SHOWN_CHARACTERS = 40
_SHOWN_NAMES = 3


@dataclass(frozen=True)
class TextToImageRequest:
    """A request that has been checked: every field has its final value.

    Attributes:
        prompt: any text, also empty.
        negative_prompt: what guidance leads away from; empty means the unconditional embedding.
        steps: sampling steps, from 1.
        guidance_scale: classifier-free guidance (Ho and Salimans, arXiv:2207.12598); 1 or less means none.
        seed: of the first image, 0 .. 2^32-1; image i uses seed + i (modulo 2^32) with a generator of its own.
        width, height: pixels, multiples of the model's `size_multiple`.
        sampler: a name of `diffuserve.samplers.SAMPLERS`.
        num_images: images drawn from the prompt.
        priority: 0 (first) .. 9 (last).
        client_id: whose request it is; the server's time is shared fairly among clients. Requests without one share one.
        timeout_ms: milliseconds from arrival until the request is given up; 0 means never.
        format: png, jpeg, webp, or raw (rows of RGB, uint8).
        encoding: base64 (text that JSON can carry) or binary.
        progress: send an event for every step.
        preview: send a small image with every k-th step's event; 0 or false means none, true is taken as 1.
    """

    prompt: str
    negative_prompt: str
    steps: int
    guidance_scale: float
    seed: int
    width: int
    height: int
    sampler: str
    num_images: int = 1
    priority: int = 5
    client_id: str = ""
    timeout_ms: int = 0
    format: str = "png"
    encoding: str = "base64"
    progress: bool = False
    preview: int = 0

    @property
    def guided(self) -> bool:
        """Whether each image takes two UNet rows: conditional and unconditional."""
        return self.guidance_scale > 1.0

    @property
    def rows(self) -> int:
        """UNet rows that it takes in every step."""
        return self.num_images * (2 if self.guided else 1)

    @property
    def seeds(self) -> tuple[int, ...]:
        """One seed an image."""
        return tuple((self.seed + index) % (MAX_SEED + 1) for index in range(self.num_images))


class EmbeddedGuidanceRequest(TextToImageRequest):
    """A request to a model whose UNet takes the guidance scale as an input (LCM): no image needs a second row."""

    @property
    def guided(self) -> bool:
        return False


def request_from_fields(fields: Mapping[str, Any], model: ModelSpec, limits: Limits) -> TextToImageRequest:
    """Checks what came from a client and fills in the model's defaults; a missing field or None means the default.

    Args:
        fields: values by field name of `TextToImageRequest`; numbers and text in Python's types.
        model: what the sizes and defaults come from.
        limits: what this server accepts.

    Raises:
        InvalidRequest: names the field, what came, what is allowed and, where it can, the nearest allowed value.
    """
    check = _Checker({name: value for name, value in fields.items() if value is not None})
    low, high = PRIORITIES
    request_class = EmbeddedGuidanceRequest if model.guidance_embedded else TextToImageRequest
    request = request_class(
        prompt=check.text("prompt", None, limits.max_prompt_bytes),
        negative_prompt=check.text("negative_prompt", "", limits.max_prompt_bytes),
        steps=check.integer("steps", min(model.default_steps, limits.max_steps), 1, limits.max_steps),
        guidance_scale=check.number("guidance_scale", model.default_guidance_scale, 0.0, limits.max_guidance_scale),
        seed=check.integer("seed", lambda: secrets.randbelow(MAX_SEED + 1), 0, MAX_SEED),
        width=check.side("width", model.width, model.size_multiple, limits.max_side_px),
        height=check.side("height", model.height, model.size_multiple, limits.max_side_px),
        sampler=check.choice("sampler", model.default_sampler, tuple(SAMPLERS)),
        num_images=check.integer("num_images", 1, 1, limits.max_images),
        priority=check.integer("priority", 5, low, high),
        client_id=check.text("client_id", "", MAX_CLIENT_ID_BYTES),
        timeout_ms=check.integer("timeout_ms", 0, 0, MAX_TIMEOUT_MS),
        format=check.choice("format", "png", FORMATS),
        encoding=check.choice("encoding", "base64", ENCODINGS),
        progress=check.flag("progress"),
        preview=check.interval("preview", limits.max_steps),
    )
    check.nothing_left()
    return request


class _Checker:
    """Takes fields one by one, each checked, and then complains about those that nobody asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values
        self._known: list[str] = []

    def _take(self, name: str, default: Any) -> Any:
        self._known.append(name)
        if name in self._values:
            return self._values.pop(name)
        return default() if isinstance(default, Callable) else default  # type: ignore[arg-type]

    def text(self, name: str, default: str | None, max_bytes: int) -> str:
        value = self._take(name, default)
        if value is None:
            raise InvalidRequest(f"{name} is missing. Give it as text; it may be empty.")
        if isinstance(value, bytes):
            try:
                value = value.decode()
            except UnicodeDecodeError as error:
                raise InvalidRequest(
                    f"{name} is not UTF-8 ({error.reason} at byte {error.start}). Encode it as UTF-8."
                ) from None
        if not isinstance(value, str):
            raise InvalidRequest(f"{name} is of type {type(value).__name__}; it must be text.")
        try:
            size_bytes = len(value.encode())
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"{name} has a lone surrogate at position {error.start}; it must be valid Unicode."
            ) from None
        if size_bytes > max_bytes:
            raise InvalidRequest(f"{name} has {size_bytes} bytes; at most {max_bytes} are allowed. Shorten it.")
        return value

    def integer(self, name: str, default: int | Callable[[], int], low: int, high: int) -> int:
        value = self._take(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidRequest(f"{name} is {_shown(value)}; it must be a whole number from {low} to {high}.")
        if not low <= value <= high:
            raise InvalidRequest(f"{name} is {_shown(value)}; it must be from {low} to {high}.")
        return value

    def interval(self, name: str, high: int) -> int:
        """Every how many steps: true means each, false none."""
        if isinstance(self._values.get(name), bool):
            self._values[name] = int(self._values[name])
        return self.integer(name, 0, 0, high)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self._take(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InvalidRequest(f"{name} is {_shown(value)}; it must be a number from {low:g} to {high:g}.")
        if not low <= value <= high:  # also refuses NaN
            raise InvalidRequest(f"{name} is {_shown(value)}; it must be from {low:g} to {high:g}.")
        return float(value)

    def side(self, name: str, default: int, multiple: int, high: int) -> int:
        high -= high % multiple
        value = self._take(name, min(default, high))
        if isinstance(value, bool) or not isinstance(value, int) or not multiple <= value <= high:
            raise InvalidRequest(
                f"{name} is {_shown(value)} px; it must be a multiple of {multiple} from {multiple} to {high}."
            )
        if value % multiple:
            below = value - value % multiple
            nearest = " or ".join(str(side) for side in (below, below + multiple))
            raise InvalidRequest(
                f"{name} is {value} px; this model needs a multiple of {multiple}. Nearest: {nearest}."
            )
        return value

    def choice(self, name: str, default: str, allowed: tuple[str, ...]) -> str:
        value = self._take(name, default)
        if isinstance(value, bytes):
            value = value.decode(errors="replace")
        if value not in allowed:
            raise InvalidRequest(f"{name} is {_shown(value)}; it must be one of {', '.join(allowed)}.")
        return str(value)

    def flag(self, name: str) -> bool:
        value = self._take(name, False)
        if not isinstance(value, bool):
            raise InvalidRequest(f"{name} is {_shown(value)}; it must be true or false.")
        return value

    def nothing_left(self) -> None:
        if self._values:
            names = sorted(self._values)
            unknown = ", ".join(map(_shown, names[:_SHOWN_NAMES]))
            if len(names) > _SHOWN_NAMES:
                unknown += f" and {len(names) - _SHOWN_NAMES} more"
            raise InvalidRequest(f"Unknown: {unknown}. A request has these fields: {', '.join(self._known)}.")


def _shown(value: Any) -> str:
    """A value of any length in a message, in Python's spelling."""
    text = value if isinstance(value, str) else repr(value)
    shown = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
    return repr(shown) if isinstance(value, str) else shown
