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
def command(bundle: Path, output: Path, limits: tuple[tuple[str, str], ...], backend: str, **arguments: Any) -> None:
    """Makes a Triton model repository that serves BUNDLE.

    Checks every file of the bundle against its checksum, writes config.pbtxt and model.py for each model and places the
    engines. One repository serves one bundle; choose another --output for another bundle. A repository that is there is
    refreshed, and options that it had and this command was not given are told.
    """
    from diffuserve.bundle.manifest import read_manifest
    from diffuserve_export.repository.assemble import repository_from_bundle
    from diffuserve_export.repository.triton_config import given_arguments

    accepted = Limits.from_parameters(read_manifest(bundle).model, dict(limits))
    serving = options_from_arguments(Serving, arguments)
    before = _given_before(output)
    manifest = repository_from_bundle(bundle, output, accepted, serving, backend=backend)
    click.echo(
        f"{output} serves {manifest.title} ({manifest.bundle_sha256[:10]}). Start it: diffuserve serve --repository {output}"
    )
    tell_what_is_lost(before, given_arguments(manifest.model, accepted, serving, backend))


def _given_before(output: Path) -> dict[str, str]:
    """What a repository that is to be refreshed was made with; nothing if there is none that can be read."""
    from diffuserve.tensors import STABLE_DIFFUSION, UNET
    from diffuserve.triton.configuration import read_config, read_options
    from diffuserve.triton.placement import described_placement
    from diffuserve_export.repository.triton_config import given_arguments

    try:
        model = described_placement(output / STABLE_DIFFUSION / "1").model
        return given_arguments(model, *read_options(output), read_config(output / UNET).backend)
    except (BundleError, ConfigurationError):
        return {}
