"""The evaluation of several checkpoints as a table, JSON and sheets of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from diffuserve.files import write_whole
from diffuserve_training.cases import cases_of
from diffuserve_training.config import Training, read_config
from diffuserve_training.dataset import Icons
from diffuserve_training.evaluate import Evaluation, Share, composed, evaluate, judged
from diffuserve_training.sampling import grid

_SHEET, _COLUMNS = 80, 10
_TITLES = {
    "style": "style as named",
    "background": "background as named",
    "place": "in the place that is named",
    "size": "of the size that is named",
    "turn": "turned as named",
    "relation": "pairs beside each other as named",
}


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
    """Prints the table and writes evaluation.json, and NUMBER-NAME.png and .txt with the first pictures and their captions,
    into `output`.

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
    tabulate(checkpoints, Icons.load(config_path, data, cache), config, output, count, styles=styles, lora=lora)


def tabulate(
    checkpoints: Sequence[Path],
    icons: Icons,
    config: Training,
    output: Path,
    count: int,
    *,
    styles: Sequence[str],
    lora: Path | None = None,
) -> None:
    """What `publish` does, with icons that are at hand."""
    output.mkdir(parents=True, exist_ok=True)
    evaluations = []
    ways = [(checkpoint, way) for checkpoint in checkpoints for way in ([None] if lora is None else [None, lora])]
    for number, (checkpoint, way) in enumerate(ways):
        figures, images, cases = evaluate(checkpoint, icons, config.data, count, styles=styles, lora=way)
        evaluations.append(figures)
        sheet = output / f"{number}-{checkpoint.name}.png"
        grid(images[:_SHEET], _COLUMNS).save(sheet)
        write_whole(sheet.with_suffix(".txt"), "".join(f"{case.prompt}\n" for case in cases[:_SHEET]).encode())
    write_whole(output / "evaluation.json", msgspec.json.format(msgspec.json.encode(evaluations), indent=2))
    cases = cases_of(icons.icons, styles, config.data.held_out, count)
    limits = judged(composed(cases, icons, config.data), cases, icons)
    columns = [
        (each.checkpoint + (f" + {Path(each.lora).name}" if each.lora else ""), _cells(each)) for each in evaluations
    ]
    columns.append(("training data", _shares(*limits)))
    names = list(columns[0][1])
    widths = [max(map(len, names)), *(max(len(title), 24) for title, _ in columns)]
    lines = [("", *(title for title, _ in columns))]
    lines += [(name, *(cells.get(name, "") for _, cells in columns)) for name in names]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    click.echo(f"Written: {output}")


def _cells(figures: Evaluation) -> dict[str, str]:
    return {
        "autoencoder": f"{figures.vae_psnr_db:.1f} dB",
        "icons to choose from": str(figures.candidates),
        **_shares(figures.named, figures.aspects),
        "variety": f"{figures.variety:.2f}",
    }


def _shares(named: dict[str, Share], aspects: dict[str, Share]) -> dict[str, str]:
    rows = {f"{group}: all as named": share for group, share in named.items()}
    rows |= {_TITLES[name]: share for name, share in aspects.items()}
    return {title: _with_interval(share) for title, share in rows.items()}


def _with_interval(share: Share) -> str:
    low, high = share.interval
    return f"{share.share:.1%} ({low:.1%} to {high:.1%}) of {share.count}"
