"""The arguments of `assemble` and `archive` that say how a server is to serve, made from the options' own tables."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from diffuserve.limits import Limits
from diffuserve.options import Option, changed, options_of

Options = TypeVar("Options")
Command = Callable[..., Any]


def arguments_of(
    kind: type[Any], leave_out: Collection[str] = (), **settings: Mapping[str, Any]
) -> Callable[[Command], Command]:
    """An argument for each option of a class.

    Args:
        kind: such as `diffuserve.serving_options.Serving`.
        leave_out: names of options that the command does not have.
        settings: of click, by an option's name, in the place of what the class says.
    """

    def decorate(command: Command) -> Command:
        for each in reversed(options_of(kind).values()):
            if each.name not in leave_out:
                command = _argument(each, settings.get(each.name, {}))(command)
        return command

    return decorate


def options_from_arguments(kind: type[Options], arguments: Mapping[str, Any]) -> Options:
    """Of all that a command was given, what belongs to a class."""
    return kind(**{name: arguments[name] for name in options_of(kind) if name in arguments})


def given(options: Any, defaults: Any) -> dict[str, str]:
    """What a command must be given for `options`: the value by argument, as in {"--limit max_steps": "200"}."""
    table = options_of(type(options))
    return {
        f"--limit {name}" if isinstance(options, Limits) else table[name].argument: str(getattr(options, name))
        for name in changed(options, defaults)
    }


def words(arguments: Mapping[str, str]) -> str:
    """Arguments as they are typed."""
    return " ".join(_typed(argument, value) for argument, value in arguments.items())


def tell_what_is_lost(before: Mapping[str, str]) -> None:
    """Says which arguments an earlier call of the command had and this one, which click runs now, was not given.

    Args:
        before: of `given`, or of a command's own arguments by their names.
    """
    now = _given_to(click.get_current_context())
    lost = {argument: value for argument, value in before.items() if argument not in now}
    if lost:
        click.echo(f"Not kept from before: {words(lost)}. To keep them, give them again.", err=True)


def _given_to(context: click.Context) -> set[str]:
    """The names of a command's arguments that were typed, whatever their values: a default may be typed too."""
    typed = {
        name
        for each in context.command.params
        if each.name and context.get_parameter_source(each.name) is ParameterSource.COMMANDLINE
        for name in each.opts
    }
    return typed | {f"--limit {name}" for name, _ in context.params["limits"]}


def _typed(argument: str, value: str) -> str:
    if value == "True":
        return argument
    return f"{argument}={value}" if " " in argument else f"{argument} {value}"


def _argument(each: Option, settings: Mapping[str, Any]) -> Callable[[Command], Command]:
    if isinstance(each.default, bool):
        return click.option(each.argument, each.name, **{"is_flag": True, "help": each.meaning, **settings})
    own = {"type": _type(each), "default": each.default, "show_default": True, "help": each.meaning}
    return click.option(each.argument, each.name, **{**own, **settings})


def _type(each: Option) -> click.ParamType:
    if each.choices:
        return click.Choice(each.choices)
    if isinstance(each.default, int):
        return click.IntRange(int(each.least), int(each.most))
    return click.FloatRange(each.least, each.most)
