"""`diffuserve assemble`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from diffuserve.tensors import STABLE_DIFFUSION
from diffuserve_export.repository.serving_arguments import CommandWithLimits, limits_argument, serving_argument
from diffuserve_export.repository.triton_backends import BACKENDS, PYTHON


@click.command("assemble", cls=CommandWithLimits, short_help="Bundle -> Triton model repository.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("triton_repo"),
    show_default=True,
    help="The model repository.",
)
@click.option(
    "--name",
    default=STABLE_DIFFUSION,
    show_default=True,
    help="What requests call the model; its stages are named after it.",
)
@limits_argument
@serving_argument("batching")
@serving_argument("policy")
@serving_argument("unet_instances")
@serving_argument("call_timeout_s")
@click.option(
    "--backend",
    type=click.Choice(list(BACKENDS)),
    default=PYTHON,
    show_default=True,
    help="Triton's backend for all models that run an engine; all but python need the Triton of NVIDIA's container.",
)
@serving_argument(
    "require_safety_checker",
    help="Refuse a BUNDLE without a safety checker, now and whenever the repository is served.",
)
def command(
    bundle: Path,
    output: Path,
    name: str,
    limits: tuple[tuple[str, str], ...],
    backend: str,
    **serving: Any,
) -> None:
    """Makes a Triton model repository that serves BUNDLE.

    Checks every file of the bundle against its checksum, writes config.pbtxt and model.py for each model and places the
    engines. A repository may serve several bundles, each under another --name; assembling one leaves the others alone.
    """
    from diffuserve.bundle.manifest import read_manifest
    from diffuserve.limits import Limits
    from diffuserve.serving_options import Serving
    from diffuserve_export.repository.assemble import repository_from_bundle

    accepted = Limits.from_parameters(read_manifest(bundle).model, dict(limits))
    manifest = repository_from_bundle(bundle, output, accepted, Serving(**serving), backend=backend, name=name)
    click.echo(
        f"{output} serves {manifest.title} ({manifest.bundle_sha256[:10]}) as {name}. Start it: diffuserve serve --repository "
        f"{output}"
    )
