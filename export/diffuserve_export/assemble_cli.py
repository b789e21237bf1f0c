"""`diffuserve assemble`."""

from __future__ import annotations

from pathlib import Path

import click


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
def command(bundle: Path, output: Path) -> None:
    """Makes a Triton model repository that serves BUNDLE.

    Checks every file of the bundle against its checksum, writes config.pbtxt and model.py for each model and places the
    engines. One repository serves one bundle; choose another --output for another bundle.
    """
    from diffuserve_export.assemble import repository_from_bundle

    manifest = repository_from_bundle(bundle, output)
    click.echo(
        f"{output} serves {manifest.model.name} ({manifest.bundle_sha256[:10]}). Start it: diffuserve serve --repository {output}"
    )
