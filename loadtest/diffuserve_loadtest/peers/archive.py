"""A TorchServe archive with another handler: the same settings as ours, the checkpoint in place of the bundle."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

_COPIED = ("model-config.yaml", "manifest.json")


def archive_with_handler(archive: Path, checkpoint: Path, handler: Path, path: Path) -> Path:
    """Writes `path`.

    Args:
        archive: ours, made by `diffuserve archive`; batch size and delays are taken from it.
        checkpoint: in diffusers' format, put into the archive as `checkpoint`.
        handler: the file of the handler's class.
        path: of the new archive.
    """
    with zipfile.ZipFile(archive) as ours, zipfile.ZipFile(path, "w") as other:
        for name in _COPIED:
            other.writestr(name, ours.read(name))
        manifest = json.loads(ours.read("MAR-INF/MANIFEST.json"))
        manifest["model"].update(modelName=path.stem, handler=handler.name)
        other.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        other.write(handler, handler.name)
        for file in sorted(checkpoint.rglob("*")):
            if file.is_file():
                other.write(file, Path("checkpoint") / file.relative_to(checkpoint))
    return path
