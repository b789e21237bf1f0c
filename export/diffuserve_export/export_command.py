"""`diffuserve export`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from diffuserve.defaults import BUNDLES

if TYPE_CHECKING:
    from diffuserve.bundle.manifest import Manifest


@click.command("export")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help=f"The bundle's folder.  [default: {BUNDLES}/NAME, the checkpoint's name]",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="CHECKPOINT",
    help="For a single file: whose configs and tokenizers to take.  [default: from the hub, by the kind of model]",
)
@click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="FILE[:SCALE]",
    help="A LoRA to fuse into the weights, style.safetensors:0.8, or the folder of one of PEFT's. May be given several times.",
)
@click.option(
    "--clip-skip",
    type=click.IntRange(min=0),
    help="Layers of the text encoders to leave out, in diffusers' meaning.  [default: what a single file says of itself, "
    "else 0]",
)
@click.option(
    "--no-safety-checker",
    is_flag=True,
    help="Leave out the checkpoint's safety checker, so that no image is checked. The bundle's manifest says so.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    help="Default of requests that name none.  [default: the checkpoint's diffuserve.json, else 20]",
)
@click.option(
    "--guidance-scale",
    type=click.FloatRange(min=0),
    help="Likewise.  [default: the checkpoint's diffuserve.json, else 7.5]",
)
@click.option("--sampler", help="Likewise.  [default: the checkpoint's diffuserve.json, else the one of its scheduler]")
@click.option(
    "--engine",
    help="What the bundle runs on, one of those that `diffuserve engines` lists; auto tries all that this machine has and "
    "keeps the fastest for each component.  [default: onnxruntime; a bundle that is up to date keeps its own]",
)
@click.option("--precision", help="Of the engine.  [default: its first that a component may have; with auto: any]")
@click.option(
    "--without-weights",
    is_flag=True,
    help="Write the graphs of the checkpoint's architecture only, from its configs and tokenizers; for diffuserve bench gpu.",
)
@click.option(
    "--allow-differences",
    is_flag=True,
    help="Write the bundle even if it differs from PyTorch by more than the tolerances.",
)
@click.option("--force", is_flag=True, help="Export even if the bundle is up to date.")
def command(
    checkpoint: Path,
    output: Path | None,
    config: Path | None,
    loras: tuple[str, ...],
    clip_skip: int | None,
    no_safety_checker: bool,
    steps: int | None,
    guidance_scale: float | None,
    sampler: str | None,
    engine: str | None,
    precision: str | None,
    without_weights: bool,
    allow_differences: bool,
    force: bool,
) -> None:
    """Exports CHECKPOINT to a bundle: a folder in diffusers' format, an id on the Hugging Face hub, or one .safetensors
    file in the original layout. Stable Diffusion 1.x, 2.x and XL, their Turbo versions, and latent consistency models.

    Every part becomes an ONNX graph and is compared with PyTorch, and an image that they draw with diffusers'; the figures
    go into the bundle's manifest.json.
    Weights are read from safetensors only, and no code of the checkpoint's is run.
    """
    from diffuserve.bundle.manifest import read_manifest
    from diffuserve_export.checkpoint.checkpoint import open_checkpoint
    from diffuserve_export.export import bundle_from_checkpoint, unchanged_manifest
    from diffuserve_export.lora import lora_from_text

    started = time.monotonic()
    if without_weights:
        if config or loras or engine or precision:
            raise click.UsageError(
                "--without-weights writes graphs that cannot run as they are: leave out --config, --lora, --engine and "
                "--precision."
            )
        written = _write_skeleton(checkpoint, output, clip_skip)
        click.echo(f"\n{written} written in {time.monotonic() - started:.0f} s. It has no weights.")
        return
    if engine or precision:
        from diffuserve.trials.engines_command import summary_lines
        from diffuserve.trials.selecting import REFERENCE, select_engines, ways_to_try

        engine = engine or REFERENCE[0]
        ways_to_try(engine, precision)  # raises now what would otherwise be known after the export
    opened = open_checkpoint(
        checkpoint,
        config=config,
        loras=tuple(map(lora_from_text, loras)),
        clip_skip=clip_skip,
        safety_checker=not no_safety_checker,
        steps=steps,
        guidance_scale=guidance_scale,
        sampler=sampler,
    )
    if opened.taken_from_file:
        click.echo(
            f"Taken from {checkpoint.name} itself: " + ", ".join(f"{k}={v}" for k, v in opened.taken_from_file.items())
        )
    output = output or BUNDLES / opened.spec.name
    if not force and unchanged_manifest(opened, output) is not None:
        click.echo(
            f"{output} is up to date: neither the checkpoint nor the exporter has changed. --force exports anyway."
        )
    else:
        bundle_from_checkpoint(opened, output, force=True, strict=not allow_differences, progress=_timed)
        click.echo()
        for line in _summary_lines(read_manifest(output)):
            click.echo(line)
        click.echo(f"\n{output} written in {time.monotonic() - started:.0f} s.")
    if engine:
        for line in summary_lines(select_engines(output, engine, precision)):
            click.echo(line)


def _write_skeleton(path: Path, output: Path | None, clip_skip: int | None) -> Path:
    from diffuserve_export.checkpoint.checkpoint import open_checkpoint
    from diffuserve_export.checkpoint.skeleton import skeleton_from_checkpoint

    opened = open_checkpoint(path, clip_skip=clip_skip, safety_checker=False, weights=False)
    return skeleton_from_checkpoint(opened, output or BUNDLES / f"{opened.spec.name}-without-weights", _timed)


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


def _summary_lines(manifest: Manifest) -> Iterator[str]:
    """A table: each component's size, and its largest error against PyTorch beside what is allowed; the image's figures."""
    yield f"{'component':<14}{'size':>10}{'worst error':>14}{'tolerance':>12}"
    for name, component in manifest.components.items():
        size_mb = sum(file.size_bytes for file in component.files) / 1e6
        worst = max(record.max_abs_error for record in component.parity)
        unit = " levels of 255" if component.tensors.outputs[0].dtype == "UINT8" else ""
        yield f"{name:<14}{size_mb:>7.1f} MB{worst:>14.2g}{component.tolerance:>12.2g}{unit}"
    for image in manifest.images:
        yield f"an image, against diffusers': {image}"
