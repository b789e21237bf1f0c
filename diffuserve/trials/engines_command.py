"""`diffuserve engines`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from diffuserve.limit_argument import limits_argument
from diffuserve.limits import PLAN_LIMITS, Limits

if TYPE_CHECKING:
    from diffuserve.bundle.manifest import Manifest


@click.command("engines", short_help="What this machine can run, and what a bundle runs on.")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option(
    "--select",
    metavar="ENGINE",
    help="auto tries every engine that this machine has on BUNDLE and keeps the fastest for each component; the name of an "
    "engine takes that one for all.",
)
@click.option(
    "--precision",
    help="Of the engine that is selected.  [default: its first that a component may have; with auto: any]",
)
@click.option(
    "--architectures",
    type=lambda text: tuple(text.split(",")),
    metavar="sm86,sm89,...",
    help="Build plans for GPUs of these compute capabilities, whatever this machine has, and try nothing. Select the engine "
    "again where they are to run, and it tries them. For tensorrt-rtx.",
)
@limits_argument(
    PLAN_LIMITS,
    f"What TensorRT's plans are built for, where servers are to have other limits than the model's own: {', '.join(PLAN_LIMITS)}.",
)
def command(
    bundle: Path | None,
    select: str | None,
    precision: str | None,
    architectures: tuple[str, ...] | None,
    limits: tuple[tuple[str, str], ...],
) -> None:
    """Lists the engines, which of them this machine can run, and what fixes the others.

    With BUNDLE, what each of its components runs on, and how the engines compared when they were tried. Assemble a
    repository again after selecting.
    """
    from diffuserve.bundle.manifest import read_manifest

    if bundle is None:
        if select or precision or architectures or limits:
            raise click.UsageError("--select, --precision, --architectures and --limit need a BUNDLE.")
        for line in _availability_lines():
            click.echo(line)
        return
    if (precision or architectures or limits) and not select:
        raise click.UsageError("--precision, --architectures and --limit need --select.")
    manifest = read_manifest(bundle)
    if select:
        from diffuserve.trials.ahead import build_ahead
        from diffuserve.trials.selecting import select_engines

        built_for = Limits.from_parameters(manifest.model, dict(limits))
        if architectures:
            manifest = build_ahead(
                bundle, select, architectures, precision, built_for, lambda name: click.echo(f"building {name} ...")
            )
        else:
            manifest = select_engines(
                bundle, select, precision, built_for, lambda name: click.echo(f"trying {name} ...")
            )
    for line in summary_lines(manifest):
        click.echo(line)


def summary_lines(manifest: Manifest) -> Iterator[str]:
    """Each component's engine, and below it the trials that led to it."""
    from diffuserve.trials.ahead import untried

    for name, component in manifest.components.items():
        yield f"{name} runs on {component.engine} in {component.precision}"
        for trial in manifest.trials:
            if trial.component == name:
                times = ", ".join(f"{1000 * seconds:.1f} ms at {batch}" for batch, seconds in trial.seconds.items())
                if trial.rejected:
                    outcome = f"rejected: {trial.rejected}"
                elif trial.tolerance:
                    outcome = f"{times}; error {trial.max_abs_error:.2g} of {trial.tolerance:.2g}"
                else:
                    outcome = f"{times}; the reference"
                yield f"  {trial.engine:<16} {trial.precision}  {outcome}"
    if line := untried(manifest):
        yield line
    if manifest.images:
        yield "an image, against diffusers' in fp32"
    for image in manifest.images:
        engines = sorted(set(image.engines.values()))
        drawn_by = engines[0] if len(engines) == 1 else ", ".join(" on ".join(each) for each in image.engines.items())
        yield f"  {drawn_by:<22} {image}"


def _availability_lines() -> Iterator[str]:
    from diffuserve.engines.availability import availability

    for way in availability():
        yield f"{way.engine:<16} {way.precision}  {f'can run, version {way.version}' if way.usable else 'cannot run'}"
        for missing in way.missing:
            yield f"    {missing.reason}: {missing.fix}"
