"""What `diffuserve export` was given, as the manifest tells it: with the names of local files and not the folders in which
they lie, which are nobody else's business."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffuserve_export.lora import Lora


def export_arguments(
    path: Path, config: Path | None, loras: Sequence[Lora], safety_checker: bool, **options: int | float | str | None
) -> tuple[str, ...]:
    """Args:
    path, config, loras, safety_checker: as of `diffuserve_export.checkpoint.checkpoint.open_checkpoint`.
    options: its other settings, by name; None for those that were not given.
    """
    given = [_name(path)]
    if config is not None:
        given += ["--config", _name(config)]
    for lora in loras:
        given += ["--lora", str(lora)]
    if not safety_checker:
        given.append("--no-safety-checker")
    for name, value in options.items():
        if value is not None:
            given += [f"--{name.replace('_', '-')}", str(value)]
    return tuple(given)


def _name(path: Path) -> str:
    """A local file's or folder's name, or an id on the hub as it is."""
    return path.resolve().name if path.exists() else str(path)
