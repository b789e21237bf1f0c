"""`diffuserve assemble`."""

from __future__ import annotations

from pathlib import Path

import click

from diffuserve.batching.policies import DEFAULT_POLICY, POLICIES
from diffuserve.tensors import STABLE_DIFFUSION
from diffuserve_export.repository.triton_backends import BACKENDS, PYTHON


@click.command("assemble", short_help="Bundle -> Triton model repository.")
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
@click.option(
    "--batching",
    type=click.Choice(["inflight", "request", "none"]),
    default="inflight",
    show_default=True,
    help="request and none are baselines to measure against.",
)
@click.option(
    "--policy",
    type=click.Choice(list(POLICIES)),
    default=DEFAULT_POLICY,
    show_default=True,
    help="Whose step is next.",
)
@click.option(
    "--unet-instances", type=click.IntRange(1), default=1, show_default=True, help="Copies of the UNet, one a GPU."
)
@click.option(
    "--backend",
    type=click.Choice(list(BACKENDS)),
    default=PYTHON,
    show_default=True,
    help="Triton's backend for all models that run an engine; all but python need the Triton of NVIDIA's container.",
)
@click.option(
    "--require-safety-checker",
    is_flag=True,
    help="Refuse a BUNDLE without a safety checker, now and whenever the repository is served.",
)
def command(
    bundle: Path,
    output: Path,
    name: str,
    batching: str,
    policy: str,
    unet_instances: int,
    backend: str,
    require_safety_checker: bool,
) -> None:
    """Makes a Triton model repository that serves BUNDLE.

    Checks every file of the bundle against its checksum, writes config.pbtxt and model.py for each model and places the
    engines. A repository may serve several bundles, each under another --name; assembling one leaves the others alone.
    """
    from diffuserve_export.repository.assemble import repository_from_bundle
    from diffuserve_export.repository.triton_config import Serving

    serving = Serving(
        batching=batching,
        policy=policy,
        unet_instances=unet_instances,
        require_safety_checker=require_safety_checker,
    )
    manifest = repository_from_bundle(bundle, output, serving, backend, name=name)
    click.echo(
        f"{output} serves {manifest.title} ({manifest.bundle_sha256[:10]}) as {name}. Start it: diffuserve serve --repository "
        f"{output}"
    )
