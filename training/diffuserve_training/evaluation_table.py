"""The evaluation of several checkpoints as a table, JSON and sheets of pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import click
import msgspec

from diffuserve.files import write_whole
from diffuserve_training.config import Training, read_config
from diffuserve_training.dataset import Icons
from diffuserve_training.evaluate import Evaluation, evaluate
from diffuserve_training.sampling import grid

_SHEET, _COLUMNS = 80, 10
_ROWS: tuple[tuple[str, Callable[[Evaluation], str]], ...] = (
    ("VAE reconstruction", lambda each: f"{each.vae_psnr_db:.1f} dB"),
    ("icons of a style", lambda each: str(each.candidates)),
    ("pictures, seen combinations", lambda each: str(each.seen.count)),
    ("  nearest icon is the one named", lambda each: f"{each.seen.top1:.1%}"),
    ("  among the nearest five", lambda each: f"{each.seen.top5:.1%}"),
    ("  background as named", lambda each: f"{each.seen.background:.1%}"),
    ("  style as named", lambda each: f"{each.seen.style:.1%}"),
    ("pictures, held-out combinations", lambda each: str(each.held_out.count)),
    ("  nearest icon is the one named", lambda each: f"{each.held_out.top1:.1%}"),
    ("  among the nearest five", lambda each: f"{each.held_out.top5:.1%}"),
    ("  background as named", lambda each: f"{each.held_out.background:.1%}"),
    ("  style as named", lambda each: f"{each.held_out.style:.1%}"),
)


def publish(checkpoints: Sequence[Path], config_path: Path, cache: Path, output: Path, count: int) -> None:
    """Prints the table and writes evaluation.json and NAME.png into `output`."""
    config = read_config(config_path, Training)
    icons = Icons.load(config_path, config.data, cache)
    output.mkdir(parents=True, exist_ok=True)
    evaluations = []
    for number, checkpoint in enumerate(checkpoints):
        figures, images = evaluate(checkpoint, icons, config.data, count)
        evaluations.append(figures)
        grid(images[:_SHEET], _COLUMNS).save(output / f"{number}-{checkpoint.name}.png")
    write_whole(output / "evaluation.json", msgspec.json.format(msgspec.json.encode(evaluations), indent=2))
    widths = [max(len(name) for name, _ in _ROWS), *(max(12, len(each.checkpoint)) for each in evaluations)]
    lines = [("", *(each.checkpoint for each in evaluations))]
    lines += [(name, *(show(each) for each in evaluations)) for name, show in _ROWS]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    click.echo(f"Written: {output}")
