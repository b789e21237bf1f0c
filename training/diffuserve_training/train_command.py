"""`diffuserve train`: the bundled model's two stages, its evaluation, and LoRAs for other checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from diffuserve.defaults import TRAINING_RUNS

if TYPE_CHECKING:
    from diffuserve_training.config import Training
    from diffuserve_training.dataset import Icons

_PATH = click.Path(path_type=Path)
_CONFIG = Path("training/configs/tiny-emoji.yaml")
_STYLES = click.Choice(["glossy", "flat", "noto"])
_config = click.option("--config", type=_PATH, default=_CONFIG, show_default=True)
_output = click.option(
    "--output",
    type=_PATH,
    default=TRAINING_RUNS / "tiny-emoji",
    show_default=True,
    help="Folder for what comes out.",
)
_cache = click.option(
    "--cache",
    type=_PATH,
    default=Path("~/.cache/diffuserve-training").expanduser(),
    help="Folder for icons  [default: ~/.cache/diffuserve-training]",
)
_seconds = click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    help="Train so long instead of so many steps: the rate rises and falls within it. Leaves nothing to go on from.",
)
_devices = click.option("--devices", default="auto", show_default=True, help="As Lightning takes them: auto, 1, 0,1.")

_start = click.option(
    "--start",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A checkpoint of this configuration to go on from, where --output has nothing of its own.",
)


def _stage(function: Callable[..., None]) -> Callable[..., None]:
    """The options of what trains the bundled model."""
    for option in (_seconds, _devices, _cache, _output, _config):
        function = option(function)
    return function


def _read(config: Path, cache: Path) -> tuple[Training, Icons]:
    from diffuserve_training.config import Training, read_config
    from diffuserve_training.dataset import Icons

    training = read_config(config, Training)
    return training, Icons.load(config, training.data, cache)


@click.group("train", short_help="Train the bundled model, or a LoRA for a checkpoint.")
def command() -> None:
    """Trains, on a CPU or on GPUs. A run that was stopped goes on where it was when it is started again."""


@command.command("vae")
@_stage
def vae(config: Path, output: Path, cache: Path, devices: str, seconds: float | None) -> None:
    """Stage one: the autoencoder."""
    from diffuserve_training.stages import train_vae

    train_vae(*_read(config, cache), output, devices=devices, seconds=seconds)


@command.command("decoder")
@_stage
@_start
def decoder(config: Path, output: Path, cache: Path, devices: str, seconds: float | None, start: Path | None) -> None:
    """Stage one once more, for the decoder alone: latents stay as they are."""
    from diffuserve_training.stages import train_decoder

    train_decoder(*_read(config, cache), output, start=start, devices=devices, seconds=seconds)


@command.command("ldm")
@_stage
@_start
def ldm(config: Path, output: Path, cache: Path, devices: str, seconds: float | None, start: Path | None) -> None:
    """Stage two: text encoder and UNet, on the autoencoder of stage one."""
    from diffuserve_training.stages import train_ldm

    train_ldm(*_read(config, cache), output, start=start, devices=devices, seconds=seconds)


@command.command("icons")
@_config
@click.option("--style", type=_STYLES, default="noto", show_default=True)
@click.option("--output", type=_PATH, default=TRAINING_RUNS / "noto", show_default=True)
@_cache
def icons(config: Path, style: str, output: Path, cache: Path) -> None:
    """The icons of one style as a folder of pictures with captions, for a LoRA."""
    import msgspec

    from diffuserve_training.config import Training, read_config
    from diffuserve_training.dataset import Icons
    from diffuserve_training.icon_folder import write_icons
    from diffuserve_training.icons import STYLES

    data = msgspec.structs.replace(read_config(config, Training).data, styles=(style,))
    written, package = write_icons(Icons.load(config, data, cache), data, output), STYLES[style]
    click.echo(f"{written} pictures in {output}, of {package.name} {package.version}; licence {package.licence}")


@command.command("lora")
@click.option("--config", type=_PATH, default=Path("training/configs/noto-style.yaml"), show_default=True)
@click.option("--output", type=_PATH, default=TRAINING_RUNS / "lora", show_default=True)
@_devices
def lora(config: Path, output: Path, devices: str) -> None:
    """A LoRA for a checkpoint in diffusers' format, from a folder of pictures with captions."""
    import msgspec

    from diffuserve_training.config import Lora, located, located_checkpoint, read_config
    from diffuserve_training.pictures import read_pictures, summary

    training = read_config(config, Lora)
    training = msgspec.structs.replace(training, checkpoint=located_checkpoint(config, training.checkpoint))
    pictures = read_pictures(located(config, training.images), training.prompt)
    click.echo(summary(pictures))
    from diffuserve_training.lora_module import train_lora  # takes seconds, so after what has been checked

    click.echo(f"Written: {train_lora(training, pictures, output, devices)}")


@command.command("eval")
@click.argument("checkpoints", type=_PATH, nargs=-1, required=True)
@_config
@_cache
@click.option("--output", type=_PATH, default=TRAINING_RUNS / "evaluation", show_default=True)
@click.option("--count", type=click.IntRange(5), default=1000, show_default=True, help="Pictures of each checkpoint.")
@click.option("--style", type=_STYLES, help="Ask for this style  [default: those of the configuration]")
@click.option(
    "--lora",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Evaluate each checkpoint without this file and with it.",
)
def evaluation(
    checkpoints: tuple[Path, ...],
    config: Path,
    cache: Path,
    output: Path,
    count: int,
    style: str | None,
    lora: Path | None,
) -> None:
    """Figures of checkpoints, side by side, with JSON and a sheet of pictures for each."""
    from diffuserve_training.evaluation_table import publish

    publish(checkpoints, config, cache, output, count, style=style, lora=lora)
