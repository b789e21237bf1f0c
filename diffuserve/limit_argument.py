"""The argument `--limit NAME=VALUE` of commands, made from the limits' own table."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import click

from diffuserve.errors import ConfigurationError
from diffuserve.limits import Limits
from diffuserve.options import Option, options_of

_LIMITS = options_of(Limits)


class CommandWithLimits(click.Command):
    """Its help ends with the limits."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        with formatter.section("Limits"):
            formatter.write_dl([(each.name, _described(each)) for each in _LIMITS.values()])


def _described(limit: Option) -> str:
    return f"{limit.meaning}  [default: {limit.default_words or f'{limit.default:.15g}'}; {limit.allowed}]"


def limits_argument(
    names: Collection[str] = tuple(_LIMITS),
    help: str = "A limit other than the default, such as max_steps=200; may be repeated. See below.",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The argument, as `limits`: pairs of name and text.

    Args:
        names: of the limits that may be given.
        help: what it means to the command.
    """

    def read(value: str) -> tuple[str, str]:
        name, equals, text = value.partition("=")
        if name not in names:
            raise click.BadParameter(f"There is no limit {name!r}. There are: {', '.join(names)}.")
        if not equals:
            raise click.BadParameter(f"{name} has no value. Write {name}=VALUE; it must be {_LIMITS[name].allowed}.")
        try:
            _LIMITS[name].from_text(text)
        except ConfigurationError as error:
            raise click.BadParameter(str(error)) from None
        return name, text

    return click.option("--limit", "limits", type=read, metavar="NAME=VALUE", multiple=True, help=help)
