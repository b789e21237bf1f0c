"""`diffuserve assemble`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from diffuserve.defaults import REPOSITORY
from diffuserve.errors import BundleError, ConfigurationError
from diffuserve.limit_argument import CommandWithLimits, limits_argument
from diffuserve.limits import Limits
from diffuserve.serving_options import Serving
from diffuserve.tensors import STABLE_DIFFUSION
from diffuserve_export.repository.serving_arguments import (
    arguments_of,
    options_from_arguments,
    tell_what_is_lost,
)
from diffuserve_export.repository.triton_backends import BACKENDS, PYTHON


@click.command("assemble", cls=CommandWithLimits, short_help="Bundle -> Triton model repository.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=REPOSITORY,
    show_default=True,
    help="The model repository.",
)
@click.option(
    "--name",
    default=STABLE_DIFFUSION,
    show_default=True,
    help="What requests call the model; its stages are named after it.",
)
@limits_argument()
@arguments_of(
    Serving,
    require_safety_checker={
        "help": "Refuse a BUNDLE without a safety checker, now and whenever the repository is served."
    },
)
@click.option(
    "--backend",
    type=click.Choice(list(BACKENDS)),
    default=PYTHON,
    show_default=True,
    help="Triton's backend for all models that run an engine; all but python need the Triton of NVIDIA's container.",
)
def command(
    bundle: Path, output: Path, name: str, limits: tuple[tuple[str, str], ...], backend: str, **arguments: Any
) -> None:
    """Makes a Triton model repository that serves BUNDLE.

    Checks every file of the bundle against its checksum, writes config.pbtxt and model.py for each model and places the
    engines. A repository may serve several bundles, each under another --name; assembling one leaves the others alone. A
    model that is there already is written again; options that it had and that are not given again are reported. A running
    server keeps what it has loaded until it is restarted.
    """
    from diffuserve.bundle.manifest import read_manifest
    from diffuserve.triton.stage_models import check_model_name
    from diffuserve_export.repository.assemble import repository_from_bundle

    check_model_name(name)  # it is part of paths below
    accepted = Limits.from_parameters(read_manifest(bundle).model, dict(limits))
    serving = options_from_arguments(Serving, arguments)
    before = _given_before(output, name)
    manifest = repository_from_bundle(bundle, output, accepted, serving, backend=backend, name=name)
    click.echo(
        f"{output} serves {manifest.title} ({manifest.bundle_sha256[:10]}) as {name}. Start it: diffuserve serve --repository "
        f"{output}"
    )
    tell_what_is_lost(before)


def _given_before(output: Path, name: str) -> dict[str, str]:
    """What a model that is to be refreshed was made with; nothing if there is none that can be read."""
    from diffuserve.tensors import UNET
    from diffuserve.triton.configuration import read_config, read_options
    from diffuserve.triton.placement import VERSION, described_placement
    from diffuserve.triton.stage_models import stage_model
    from diffuserve_export.repository.triton_config import given_arguments

    try:
        model = described_placement(output / name / VERSION).model
        backend = read_config(output / stage_model(name, UNET)).backend
        return given_arguments(model, *read_options(output, name), backend, name)
    except (BundleError, ConfigurationError):
        return {}
