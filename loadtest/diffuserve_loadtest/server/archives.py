"""A TorchServe archive with another handler: the checkpoint in place of the bundle."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

_CONFIG = "model-config.yaml"


def archive_with_handler(archive: Path, checkpoint: Path, handler: Path, path: Path) -> Path:
    """Writes `path`.

    Args:
        archive: ours, made by `diffuserve archive`, which has what our launcher asks of an archive.
        checkpoint: in diffusers' format, put into the archive as `checkpoint`.
        handler: the file of the handler's class; what the model-config.yaml beside it says goes before what our archive's does.
        path: of the new archive.
    """
    import yaml

    with zipfile.ZipFile(archive) as ours, zipfile.ZipFile(path, "w") as other:
        other.writestr("manifest.json", ours.read("manifest.json"))
        config = {**yaml.safe_load(ours.read(_CONFIG)), **yaml.safe_load(handler.with_name(_CONFIG).read_text())}
        other.writestr(_CONFIG, yaml.safe_dump(config))
        manifest = json.loads(ours.read("MAR-INF/MANIFEST.json"))
        manifest["model"].update(modelName=path.stem, handler=handler.name)
        other.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        other.write(handler, handler.name)
        for file in sorted(checkpoint.rglob("*")):
            if file.is_file():
                other.write(file, Path("checkpoint") / file.relative_to(checkpoint))
    return path
