"""Options that an operator sets: what each may be, what it means, and how it is read from text.

A class of options is a frozen dataclass whose fields are made by `option` and whose `__post_init__` calls `check`, so that
a value of it is always one that may be used.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, TypeVar

from diffuserve.errors import ConfigurationError

Options = TypeVar("Options")
_KEY = "option"


@dataclass(frozen=True)
class Option:
    """One option.

    `default`: its type, int, float, bool or str, is the option's; `least`, `most`: of a number, both allowed; `choices`: of
    text; `default_words`: for a default that depends on the model.
    """

    name: str
    meaning: str
    default: Any
    least: float = 0
    most: float = 0
    choices: tuple[str, ...] = ()
    default_words: str = ""

    @property
    def argument(self) -> str:
        """Of a command: the name without its unit."""
        return "--" + re.sub("_(s|ms)$", "", self.name).replace("_", "-")

    @property
    def allowed(self) -> str:
        """In words."""
        if isinstance(self.default, bool):
            return "true or false"
        if isinstance(self.default, str):
            return f"one of {', '.join(self.choices)}"
        kind = "a whole number" if isinstance(self.default, int) else "a number"
        return f"{kind} from {self.least:.15g} to {self.most:.15g}"

    def from_text(self, text: str) -> Any:
        """Raises ConfigurationError if the text is not of the option's type."""
        kind = type(self.default)
        try:
            value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            raise self._error(text) from None
        self.check(value)
        return value

    def check(self, value: Any) -> None:
        """Raises ConfigurationError if the option may not be `value`, which is of its type."""
        if isinstance(self.default, bool):
            return
        allowed = value in self.choices if isinstance(self.default, str) else self.least <= value <= self.most
        if not allowed:  # NaN is not, either
            raise self._error(value)

    def _error(self, value: object) -> ConfigurationError:
        return ConfigurationError(f"{self.name} is {value!r}; it must be {self.allowed}.")


def option(default: Any, meaning: str, **allowed: Any) -> Any:
    """A dataclass's field; the arguments are those of `Option`."""
    return field(default=default, metadata={_KEY: (meaning, allowed)})


def options_of(kind: type[Any]) -> dict[str, Option]:
    """The options of a class by name, in its order."""
    return {each.name: _option(each) for each in fields(kind)}


def check(options: Any) -> None:
    """Raises ConfigurationError if an option has a value that it may not have."""
    for name, each in options_of(type(options)).items():
        each.check(getattr(options, name))


def from_parameters(defaults: Options, parameters: Mapping[str, str]) -> Options:
    """`defaults` with the values of those parameters that carry an option's name.

    Raises:
        ConfigurationError: a value is of another type or not allowed.
    """
    known = options_of(type(defaults))
    given = {name: known[name].from_text(text) for name, text in parameters.items() if name in known}
    return replace(defaults, **given)  # type: ignore[type-var]


def check_known(parameters: Iterable[str], known: Collection[str]) -> None:
    """Raises ConfigurationError if a name is not among those known."""
    for name in parameters:
        if name not in known:
            raise ConfigurationError(f"There is no parameter {name!r}. There are: {', '.join(known)}.")


def to_parameters(*options: Any) -> dict[str, str]:
    """Every option as text, by name, which `from_parameters` reads."""
    return {name: str(getattr(each, name)) for each in options for name in options_of(type(each))}


def changed(options: Any, defaults: Any) -> Iterator[str]:
    """The names of the options that are not as in `defaults`."""
    return (name for name in options_of(type(options)) if getattr(options, name) != getattr(defaults, name))


def _option(each: Field[Any]) -> Option:
    meaning, allowed = each.metadata[_KEY]
    return Option(each.name, meaning, each.default, **allowed)
