"""The settings of a request as options of a command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from diffuserve.request import FIELDS
from diffuserve.request_fields import Choice, Field

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

_TYPE = {"BYTES": str, "INT64": int, "FP64": float, "BOOL": bool}

# Those that a command takes otherwise than a request.
_OWN: dict[str, Decorator | None] = {
    "prompt": None,
    "seed": click.option(
        "--seed", "seeds", type=int, multiple=True, help="Of the first image; repeat it for several. [random]"
    ),
    "num_images": click.option(
        "-n", "--num-images", type=click.IntRange(min=1), default=1, help="Images per prompt and seed. [1]"
    ),
    "timeout_ms": click.option(
        "--timeout", "timeout_s", metavar="SECONDS", type=float, help="Give a request up after so long."
    ),
    "format": click.option(
        "--format", type=click.Choice(["png", "jpeg", "webp"]), help="[the output's extension, or png]"
    ),
}


def request_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator: an option for every setting, None where it is not given, passed on by its name in `RequestFields`."""
    for name, field in reversed(list(FIELDS.items())):
        if field.setting and (option := _OWN.get(name, _option(name, field))) is not None:
            command = option(command)
    return command


def _option(name: str, field: Field) -> Decorator:
    default = f" [{field.default}]" if field.default and not callable(field.default) else ""
    return click.option(
        f"--{name.replace('_', '-')}",
        name,
        type=_TYPE[field.dtype],
        metavar="NAME" if isinstance(field, Choice) else None,  # None leaves it to the type
        help=field.help + default,
    )
