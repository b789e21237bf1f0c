"""`diffuserve archive`."""

from __future__ import annotations

from pathlib import Path

import click

from diffuserve.batching.policies import DEFAULT_POLICY, POLICIES

_ARCHIVES = Path("model_store/mar")


@click.command("archive", short_help="Bundle -> model archive for TorchServe.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help=f"The archive.  [default: {_ARCHIVES}/NAME.mar, the model's name]",
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Requests that share a batch, at most."
)
@click.option(
    "--max-batch-delay",
    "max_batch_delay_ms",
    type=click.IntRange(0),
    default=50,
    show_default=True,
    help="Milliseconds that TorchServe waits for them.",
)
@click.option(
    "--min-workers", type=click.IntRange(1), default=1, show_default=True, help="Processes, each with a model."
)
@click.option("--max-workers", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--response-timeout",
    "response_timeout_s",
    type=click.IntRange(1),
    default=600,
    show_default=True,
    help="Seconds that a batch may take; a worker that takes longer is started again.",
)
@click.option("--device", type=click.Choice(["cpu", "gpu"]), default="cpu", show_default=True)
@click.option(
    "--policy", type=click.Choice(list(POLICIES)), default=DEFAULT_POLICY, show_default=True, help="Whose step is next."
)
@click.option("--require-safety-checker", is_flag=True, help="Refuse a bundle without one.")
@click.option(
    "--by-reference", is_flag=True, help="Name the bundle's path in the archive instead of copying it, for large ones."
)
def command(
    bundle: Path,
    output: Path | None,
    batch_size: int,
    max_batch_delay_ms: int,
    min_workers: int,
    max_workers: int,
    response_timeout_s: int,
    device: str,
    policy: str,
    require_safety_checker: bool,
    by_reference: bool,
) -> None:
    """Packs BUNDLE into a .mar that TorchServe serves with the same core, so that the same seed gives the same image.

    Checks every file of the bundle against its checksum. TorchServe's Python needs diffuserve installed. In place of a
    bundle a checkpoint's folder may be given, which PyTorch then runs as it is, slower: that needs no export, but
    diffuserve[export] for TorchServe, too.
    """
    from diffuserve.bundle.manifest import MANIFEST_NAME, read_manifest
    from diffuserve_export.repository.archive import TorchServing, archive_from_bundle, archive_from_checkpoint

    if max_workers < min_workers:
        raise click.UsageError(f"--max-workers is {max_workers}, less than --min-workers, which is {min_workers}.")
    serving = TorchServing(
        batch_size=batch_size,
        max_batch_delay_ms=max_batch_delay_ms,
        min_workers=min_workers,
        max_workers=max_workers,
        response_timeout_s=response_timeout_s,
        device=device,
        policy=policy,
        require_safety_checker=require_safety_checker,
    )
    if (bundle / "model_index.json").is_file() and not (bundle / MANIFEST_NAME).is_file():
        if by_reference:
            raise click.UsageError(
                f"{bundle} is a checkpoint, which cannot be archived --by-reference. Export it first."
            )
        output = output or _ARCHIVES / f"{bundle.resolve().name}-eager.mar"
        manifest = archive_from_checkpoint(bundle, output, serving)
    else:
        output = output or _ARCHIVES / f"{read_manifest(bundle).model.name}.mar"
        manifest = archive_from_bundle(bundle, output, serving, by_reference=by_reference)
    click.echo(
        f"{output} holds {manifest.model.name} ({manifest.bundle_sha256[:10]}), {output.stat().st_size / 1e6:.1f} MB. "
        f"Start it: diffuserve serve --server torchserve --archive {output}"
    )
