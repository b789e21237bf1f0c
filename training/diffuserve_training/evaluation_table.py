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


def publish(
    checkpoints: Sequence[Path],
    config_path: Path,
    cache: Path,
    output: Path,
    count: int,
    *,
    style: str | None = None,
    lora: Path | None = None,
) -> None:
    """Prints the table and writes evaluation.json and NUMBER-NAME.png into `output`.

    Args:
        checkpoints: folders.
        config_path: of the training; its data are what pictures are compared with.
        cache: for icons.
        output: folder.
        count: pictures of each checkpoint.
        style: asked for instead of those of the configuration, and looked for among them.
        lora: a file; each checkpoint is evaluated without it and with it.
    """
    config = read_config(config_path, Training)
    styles = config.data.styles if style is None else (style,)
    data = msgspec.structs.replace(config.data, styles=tuple(dict.fromkeys((*config.data.styles, *styles))))
    icons = Icons.load(config_path, data, cache)
    output.mkdir(parents=True, exist_ok=True)
    evaluations = []
    ways = [(checkpoint, way) for checkpoint in checkpoints for way in ([None] if lora is None else [None, lora])]
    for number, (checkpoint, way) in enumerate(ways):
        figures, images = evaluate(checkpoint, icons, data, count, styles=styles, lora=way)
        evaluations.append(figures)
        grid(images[:_SHEET], _COLUMNS).save(output / f"{number}-{checkpoint.name}.png")
    write_whole(output / "evaluation.json", msgspec.json.format(msgspec.json.encode(evaluations), indent=2))
    titles = [each.checkpoint + (f" + {Path(each.lora).name}" if each.lora else "") for each in evaluations]
    widths = [max(len(name) for name, _ in _ROWS), *(max(12, len(title)) for title in titles)]
    lines = [("", *titles)]
    lines += [(name, *(show(each) for each in evaluations)) for name, show in _ROWS]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    click.echo(f"Written: {output}")
