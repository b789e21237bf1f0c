"""Kinds of request fields: what a value may be, how it is checked, and what it says of itself.

Which fields there are is declared in `diffuserve.request`; all else follows from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from diffuserve.errors import InvalidRequest

if TYPE_CHECKING:
    from diffuserve.bundle.manifest import ModelSpec
    from diffuserve.limits import Limits

# What depends on the server is a function of its model and its limits.
Of = Callable[["ModelSpec", "Limits"], Any]
# Of a refused value in a message.
_SHOWN_CHARACTERS = 40


class FieldDescription(msgspec.Struct, frozen=True, omit_defaults=True, rename="camel"):
    """One field as a server takes it, in JSON Schema's words.

    Attributes:
        type: string, integer, number or boolean.
        description: one line for people.
        default: None where a request has to name it, and of a seed, which is drawn.
        max_bytes: of text in UTF-8.
    """

    type: str
    description: str
    default: bool | int | float | str | None = None
    minimum: int | float | None = None
    maximum: int | float | None = None
    multiple_of: int | None = None
    enum: tuple[str, ...] | None = None
    max_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field of a request.

    Attributes:
        help: one line for people: on command lines, in docs, in descriptions.
        default: what a request has that does not name it; None where it has to.
        tensor: whether Triton carries it as an input of one value; the others are parameters of the request.
        setting: whether callers choose it; the others are how a client wants to be answered.
        infotext: its name in the text inside images, if it is told there as it is.
    """

    dtype: ClassVar[str]
    """BYTES for text, INT64 for whole numbers, FP64 for others, BOOL."""

    help: str = field(kw_only=False)
    default: Any | Of = None
    tensor: bool = False
    setting: bool = True
    infotext: str = ""

    def check(self, name: str, value: Any, model: ModelSpec, limits: Limits) -> Any:
        """The value as a checked request has it.

        Args:
            name: the field's.
            value: what came, in Python's types; None for the default.
            model, limits: the server's.

        Raises:
            InvalidRequest: names the field, what came and what is allowed.
        """
        raise NotImplementedError

    def describe(self, model: ModelSpec, limits: Limits) -> FieldDescription:
        """What a server with this model and these limits takes."""
        raise NotImplementedError

    def or_default(self, value: Any, model: ModelSpec, limits: Limits) -> Any:
        return settled(self.default, model, limits) if value is None else value


@dataclass(frozen=True, kw_only=True)
class Text(Field):
    """Text of `max_bytes` in UTF-8 at most; it may come encoded."""

    dtype = "BYTES"
    max_bytes: int | Of

    def check(self, name: str, value: Any, model: ModelSpec, limits: Limits) -> str:
        value, max_bytes = self.or_default(value, model, limits), settled(self.max_bytes, model, limits)
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

    def describe(self, model: ModelSpec, limits: Limits) -> FieldDescription:
        max_bytes = settled(self.max_bytes, model, limits)
        return FieldDescription("string", self.help, self.or_default(None, model, limits), max_bytes=max_bytes)


@dataclass(frozen=True, kw_only=True)
class Integer(Field):
    """A whole number from `low` to `high`. `random`: the default is another for every request."""

    dtype = "INT64"
    low: int = 0
    high: int | Of
    random: bool = False

    def check(self, name: str, value: Any, model: ModelSpec, limits: Limits) -> int:
        value, high = self.or_default(value, model, limits), settled(self.high, model, limits)
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidRequest(f"{name} is {shown(value)}; it must be a whole number from {self.low} to {high}.")
        if not self.low <= value <= high:
            raise InvalidRequest(f"{name} is {shown(value)}; it must be from {self.low} to {high}.")
        return value

    def describe(self, model: ModelSpec, limits: Limits) -> FieldDescription:
        default = None if self.random else self.or_default(None, model, limits)
        return FieldDescription("integer", self.help, default, self.low, settled(self.high, model, limits))


@dataclass(frozen=True, kw_only=True)
class Interval(Integer):
    """Every how many steps: true means each, false none."""

    def check(self, name: str, value: Any, model: ModelSpec, limits: Limits) -> int:
        return super().check(name, int(value) if isinstance(value, bool) else value, model, limits)


@dataclass(frozen=True, kw_only=True)
class Side(Field):
    """Pixels, a multiple of what the model needs. A default beyond what the server allows becomes the most that it does."""

    dtype = "INT64"

    def check(self, name: str, value: Any, model: ModelSpec, limits: Limits) -> int:
        value, multiple, high = self.or_default(value, model, limits), model.size_multiple, _highest_side(model, limits)
        if isinstance(value, bool) or not isinstance(value, int) or not multiple <= value <= high:
            raise InvalidRequest(
                f"{name} is {shown(value)} px; it must be a multiple of {multiple} from {multiple} to {high}."
            )
        if value % multiple:
            below = value - value % multiple
            nearest = " or ".join(str(side) for side in (below, below + multiple))
            raise InvalidRequest(
                f"{name} is {value} px; this model needs a multiple of {multiple}. Nearest: {nearest}."
            )
        return value

    def describe(self, model: ModelSpec, limits: Limits) -> FieldDescription:
        default, multiple = self.or_default(None, model, limits), model.size_multiple
        return FieldDescription("integer", self.help, default, multiple, _highest_side(model, limits), multiple)

    def or_default(self, value: Any, model: ModelSpec, limits: Limits) -> Any:
        if value is not None:
            return value
        return min(super().or_default(None, model, limits), _highest_side(model, limits))


@dataclass(frozen=True, kw_only=True)
class Number(Field):
    """Any number from `low` to `high`."""

    dtype = "FP64"
    low: float = 0.0
    high: float | Of

    def check(self, name: str, value: Any, model: ModelSpec, limits: Limits) -> float:
        value, low, high = self.or_default(value, model, limits), self.low, settled(self.high, model, limits)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InvalidRequest(f"{name} is {shown(value)}; it must be a number from {low:g} to {high:g}.")
        if not low <= value <= high:  # also refuses NaN
            raise InvalidRequest(f"{name} is {shown(value)}; it must be from {low:g} to {high:g}.")
        return float(value)

    def describe(self, model: ModelSpec, limits: Limits) -> FieldDescription:
        default, high = self.or_default(None, model, limits), settled(self.high, model, limits)
        return FieldDescription("number", self.help, default, self.low, high)


@dataclass(frozen=True, kw_only=True)
class Choice(Field):
    """One of several words."""

    dtype = "BYTES"
    choices: tuple[str, ...] | Of

    def check(self, name: str, value: Any, model: ModelSpec, limits: Limits) -> str:
        value, choices = self.or_default(value, model, limits), settled(self.choices, model, limits)
        if isinstance(value, bytes):
            value = value.decode(errors="replace")
        if value not in choices:
            raise InvalidRequest(f"{name} is {shown(value)}; it must be one of {', '.join(choices)}.")
        return str(value)

    def describe(self, model: ModelSpec, limits: Limits) -> FieldDescription:
        default, choices = self.or_default(None, model, limits), settled(self.choices, model, limits)
        return FieldDescription("string", self.help, default, enum=choices)


@dataclass(frozen=True, kw_only=True)
class Flag(Field):
    """True or false."""

    dtype = "BOOL"
    default: bool = False

    def check(self, name: str, value: Any, model: ModelSpec, limits: Limits) -> bool:
        value = self.or_default(value, model, limits)
        if not isinstance(value, bool):
            raise InvalidRequest(f"{name} is {shown(value)}; it must be true or false.")
        return value

    def describe(self, model: ModelSpec, limits: Limits) -> FieldDescription:
        return FieldDescription("boolean", self.help, self.default)


def settled(value: Any | Of, model: ModelSpec, limits: Limits) -> Any:
    """A value that may be a function of the server's model and limits."""
    return value(model, limits) if callable(value) else value


def shown(value: Any) -> str:
    """A value of any length in a message, in Python's spelling."""
    text = value if isinstance(value, str) else repr(value)
    shortened = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
    return repr(shortened) if isinstance(value, str) else shortened


def _highest_side(model: ModelSpec, limits: Limits) -> int:
    return limits.max_side_px - limits.max_side_px % model.size_multiple
