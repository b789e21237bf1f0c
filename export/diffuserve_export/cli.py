"""`diffuserve export`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from diffuserve.bundle import Component

_BUNDLES = Path("model_store/bundles")


@click.command("export")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help=f"The bundle's folder.  [default: {_BUNDLES}/NAME, the checkpoint's name]",
)
@click.option(
    "--guidance-scale",
    type=click.FloatRange(min=0),
    help="Default of requests that name none.  [default: the checkpoint's diffuserve.json, else 7.5]",
)
@click.option(
    "--engine",
    help="What the bundle runs on, one of those that `diffuserve engines` lists; auto tries all that this machine has and "
    "keeps the fastest for each component.  [default: onnxruntime; a bundle that is up to date keeps its own]",
)
@click.option("--precision", help="Of the engine.  [default: fp32, for tensorrt fp16; with auto: any]")
@click.option("--force", is_flag=True, help="Export even if the bundle is up to date.")
def command(
    checkpoint: Path,
    output: Path | None,
    guidance_scale: float | None,
    engine: str | None,
    precision: str | None,
    force: bool,
) -> None:
    """Exports CHECKPOINT, a folder in diffusers' format, to a bundle.

    Every part becomes an ONNX graph and is compared with PyTorch; the figures go into the bundle's manifest.json.
    Weights are read from safetensors only, and no code of the checkpoint's is run.
    """
    from diffuserve.bundle import read_manifest
    from diffuserve_export.checkpoint import open_checkpoint
    from diffuserve_export.export import bundle_from_checkpoint, unchanged_manifest

    started = time.monotonic()
    if engine or precision:
        from diffuserve.engines.cli import summary_lines
        from diffuserve.engines.trials import REFERENCE, select_engines, ways_to_try

        engine = engine or REFERENCE[0]
        ways_to_try(engine, precision)  # raises now what would otherwise be known after the export
    opened = open_checkpoint(checkpoint, guidance_scale=guidance_scale)
    output = output or _BUNDLES / opened.spec.name
    if not force and unchanged_manifest(opened, output) is not None:
        click.echo(
            f"{output} is up to date: neither the checkpoint nor the exporter has changed. --force exports anyway."
        )
    else:
        bundle_from_checkpoint(opened, output, force=True, progress=_timed)
        click.echo()
        for line in _summary_lines(read_manifest(output).components):
            click.echo(line)
        click.echo(f"\n{output} written in {time.monotonic() - started:.0f} s.")
    if engine:
        for line in summary_lines(select_engines(output, engine, precision)):
            click.echo(line)


@contextmanager
def _timed(title: str) -> Iterator[None]:
    """One line: what is done, and once it is done the time that it took."""
    click.echo(f"{title:<22}", nl=False)
    started = time.monotonic()
    try:
        yield
    except BaseException:
        click.echo(" failed")
        raise
    click.echo(f" {time.monotonic() - started:5.1f} s")


def _summary_lines(components: Mapping[str, Component]) -> Iterator[str]:
    """A table: each component's size, and its largest error against PyTorch beside what is allowed."""
    yield f"{'component':<14}{'size':>10}{'worst error':>14}{'tolerance':>12}"
    for name, component in components.items():
        size_mb = sum(file.size_bytes for file in component.files) / 1e6
        worst = max(record.max_abs_error for record in component.parity)
        unit = " levels of 255" if component.tensors.outputs[0].dtype == "UINT8" else ""
        yield f"{name:<14}{size_mb:>7.1f} MB{worst:>14.2g}{component.tolerance:>12.2g}{unit}"
