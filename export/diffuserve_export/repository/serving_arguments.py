"""The arguments of `assemble` and `archive` that say how a server is to serve, made from the options' own tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from diffuserve.errors import ConfigurationError
from diffuserve.limits import Limits
from diffuserve.options import Option, options_of
from diffuserve.serving_options import Serving

_LIMITS = options_of(Limits)
_SERVING = options_of(Serving)
# The argument of each option of `Serving`.
_ARGUMENTS = {
    "batching": "--batching",
    "policy": "--policy",
    "unet_instances": "--unet-instances",
    "call_timeout_s": "--call-timeout",
    "require_safety_checker": "--require-safety-checker",
}


class CommandWithLimits(click.Command):
    """Its help ends with the limits."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        with formatter.section("Limits"):
            formatter.write_dl([(each.name, _described(each)) for each in _LIMITS.values()])


def _described(limit: Option) -> str:
    return f"{limit.meaning}  [default: {limit.default_words or f'{limit.default:g}'}; {limit.allowed}]"


class _Limit(click.ParamType):
    name = "NAME=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        name, equals, text = str(value).partition("=")
        if not equals or name not in _LIMITS:
            self.fail(f"{value!r} is not a limit and its value. The limits are: {', '.join(_LIMITS)}.", param, ctx)
        try:
            _LIMITS[name].from_text(text)
        except ConfigurationError as error:
            self.fail(str(error), param, ctx)
        return name, text


limits_argument = click.option(
    "--limit",
    "limits",
    type=_Limit(),
    multiple=True,
    help="A limit other than the default, such as max_steps=200; may be repeated. See below.",
)


def serving_argument(name: str, **settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The argument for an option of `Serving`; `settings` go before what its table says."""
    each = _SERVING[name]
    settings = {"help": each.meaning, **settings}
    if isinstance(each.default, bool):
        return click.option(_ARGUMENTS[name], name, is_flag=True, **settings)
    return click.option(
        _ARGUMENTS[name], name, **{"type": _type(each), "default": each.default, "show_default": True, **settings}
    )


def _type(each: Option) -> click.ParamType:
    if each.choices:
        return click.Choice(each.choices)
    return (
        click.IntRange(int(each.least), int(each.most))
        if isinstance(each.default, int)
        else click.FloatRange(each.least, each.most)
    )
