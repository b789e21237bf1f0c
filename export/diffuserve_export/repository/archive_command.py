"""`diffuserve archive`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import click

from diffuserve.defaults import BATCH_TIMEOUT_S
from diffuserve_export.repository.serving_arguments import CommandWithLimits, limits_argument, serving_argument

_ARCHIVES = Path("model_store/mar")


@click.command("archive", cls=CommandWithLimits, short_help="Bundle -> model archive for TorchServe.")
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
@serving_argument(
    "call_timeout_s",
    default=BATCH_TIMEOUT_S,
    help="Seconds that a batch, and so every call in it, may take; a worker that takes longer is started again.",
)
@click.option("--device", type=click.Choice(["cpu", "gpu"]), default="cpu", show_default=True)
@limits_argument
@serving_argument("batching")
@serving_argument("policy")
@serving_argument("require_safety_checker", help="Refuse a BUNDLE without a safety checker.")
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
    device: str,
    limits: tuple[tuple[str, str], ...],
    by_reference: bool,
    **serving: Any,
) -> None:
    """Packs BUNDLE into a .mar that TorchServe serves with the same core, so that the same seed gives the same image.

    Checks every file of the bundle against its checksum. TorchServe's Python needs diffuserve installed. In place of a
    bundle a checkpoint's folder may be given, which PyTorch then runs as it is, slower: that needs no export, but
    diffuserve[export] for TorchServe, too.
    """
    from diffuserve.bundle.manifest import MANIFEST_NAME, read_manifest
    from diffuserve.limits import Limits
    from diffuserve.serving_options import Serving
    from diffuserve_export.repository.archive import TorchServing, archive_from_bundle, bundle_of_checkpoint

    if max_workers < min_workers:
        raise click.UsageError(f"--max-workers is {max_workers}, less than --min-workers, which is {min_workers}.")
    torchserve = TorchServing(
        batch_size=batch_size,
        max_batch_delay_ms=max_batch_delay_ms,
        min_workers=min_workers,
        max_workers=max_workers,
        device=device,
    )
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
        output = output or _ARCHIVES / f"{name or model.name}.mar"
        accepted = Limits.from_parameters(model, dict(limits))
        manifest = archive_from_bundle(
            bundle, output, accepted, Serving(**serving), torchserve=torchserve, by_reference=by_reference
        )
    click.echo(
        f"{output} holds {manifest.model.name} ({manifest.bundle_sha256[:10]}), {output.stat().st_size / 1e6:.1f} MB. "
        f"Start it: diffuserve serve --server torchserve --archive {output}"
    )
