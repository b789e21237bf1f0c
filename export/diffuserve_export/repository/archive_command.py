"""`diffuserve archive`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import click

from diffuserve.defaults import ARCHIVES, BATCH_TIMEOUT_S
from diffuserve.errors import DiffuserveError
from diffuserve.limit_argument import CommandWithLimits, limits_argument
from diffuserve.limits import Limits
from diffuserve.serving_options import Serving
from diffuserve_export.repository.serving_arguments import (
    arguments_of,
    given,
    options_from_arguments,
    tell_what_is_lost,
)
from diffuserve_export.repository.torchserve_options import TorchServing


@click.command("archive", cls=CommandWithLimits, short_help="Bundle -> model archive for TorchServe.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help=f"The archive.  [default: {ARCHIVES}/NAME.mar, the model's name]",
)
@arguments_of(TorchServing)
@limits_argument()
@arguments_of(
    Serving,
    leave_out=["unet_instances"],
    call_timeout_s={
        "default": BATCH_TIMEOUT_S,
        "help": "Seconds that a batch, and so every call in it, may take; a worker that takes longer is started again.",
    },
    require_safety_checker={"help": "Refuse a BUNDLE without a safety checker."},
)
@click.option(
    "--by-reference", is_flag=True, help="Name the bundle's path in the archive instead of copying it, for large ones."
)
def command(
    bundle: Path, output: Path | None, limits: tuple[tuple[str, str], ...], by_reference: bool, **arguments: Any
) -> None:
    """Packs BUNDLE into a .mar that TorchServe serves with the same core, so that the same seed gives the same image.

    Checks every file of the bundle against its checksum. TorchServe's Python needs diffuserve installed. In place of a
    bundle a checkpoint's folder may be given, which PyTorch then runs as it is, slower: that needs no export, but
    diffuserve[export] for TorchServe, too. An archive of that name is replaced, and options that it had and this command
    was not given are told.
    """
    from diffuserve.bundle.manifest import MANIFEST_NAME, read_manifest
    from diffuserve_export.repository.archive import archive_from_bundle, bundle_of_checkpoint

    torchserve = options_from_arguments(TorchServing, arguments)
    serving = options_from_arguments(Serving, arguments)
    with contextlib.ExitStack() as stack:
        name = None
        if (bundle / "model_index.json").is_file() and not (bundle / MANIFEST_NAME).is_file():
            if by_reference:
                raise click.UsageError(
                    f"{bundle} is a checkpoint, which cannot be archived --by-reference. Export it first."
                )
            name = f"{bundle.resolve().name}-eager"
            bundle = stack.enter_context(bundle_of_checkpoint(bundle))
        model = read_manifest(bundle).model
        output = output or ARCHIVES / f"{name or model.name}.mar"
        accepted = Limits.from_parameters(model, dict(limits))
        before = _given_before(output)
        manifest = archive_from_bundle(
            bundle, output, accepted, serving, torchserve=torchserve, by_reference=by_reference
        )
    click.echo(
        f"{output} holds {manifest.model.name} ({manifest.bundle_sha256[:10]}), {output.stat().st_size / 1e6:.1f} MB. "
        f"Start it: diffuserve serve --server torchserve --archive {output}"
    )
    tell_what_is_lost(before)


def _given_before(output: Path) -> dict[str, str]:
    """What an archive that is to be replaced was made with; nothing if there is none that can be read."""
    from diffuserve.torchserve.configuration import read_archive

    try:
        archive = read_archive(output)
        torchserve = TorchServing.from_config(archive.config)
    except (DiffuserveError, KeyError, TypeError):
        return {}
    return {
        **given(torchserve, TorchServing()),
        **given(archive.limits, Limits.for_model(archive.manifest.model)),
        **given(archive.serving, Serving(call_timeout_s=BATCH_TIMEOUT_S)),
    }
