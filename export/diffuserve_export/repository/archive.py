"""A bundle to a model archive for TorchServe.

tiny-emoji.mar
    MAR-INF/MANIFEST.json       torch-model-archiver's
    model-config.yaml           how TorchServe serves it, and what the handler is told
    diffuserve_handler.py       a few lines that import the class from the package
    manifest.json, unet/ ...    the bundle, unless it is referred to by its path
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffuserve import __version__
from diffuserve.batching.policies import DEFAULT_POLICY
from diffuserve.bundle.checksums import verify
from diffuserve.bundle.manifest import MANIFEST_NAME, Manifest, read_manifest
from diffuserve.errors import BundleError
from diffuserve.images.safety import refuse_without_safety_checker
from diffuserve.limits import Limits
from diffuserve_export.graphs.eager import ENGINE, eager_bundle_from_checkpoint

CONFIG_NAME = "model-config.yaml"
_HANDLER_NAME = "diffuserve_handler.py"
_HANDLER = '''"""Entry point for TorchServe; the handler lives in the installed package."""

from diffuserve_handlers import TextToImageHandler


class Handler(TextToImageHandler):
    """TorchServe takes the one class that is defined in this file."""
'''
# The packages know of each other by this file only: handlers/ runs engines, export/ makes them of a checkpoint.
_EAGER_HANDLER = '''"""Entry point for TorchServe, for a checkpoint that PyTorch runs as it is."""

from diffuserve_export.graphs.eager import eager_engines
from diffuserve_handlers import TextToImageHandler


class Handler(TextToImageHandler):
    load_engines = staticmethod(eager_engines)
'''


@dataclass(frozen=True)
class TorchServing:
    """How TorchServe serves an archive.

    `batch_size`: requests that it hands to a worker together, at most; `max_batch_delay_ms`: how long it waits for them;
    `min_workers`, `max_workers`: processes, each with the whole model; `response_timeout_s`: after so long without an
    answer a worker counts as hung and is started again, so a whole batch must fit in; `startup_timeout_s`: the same for
    loading; `device`: cpu or gpu; `require_safety_checker`: archive no bundle without one, and an archive serves no other
    bundle than its own.
    """

    batch_size: int = 8
    max_batch_delay_ms: int = 50
    min_workers: int = 1
    max_workers: int = 1
    response_timeout_s: int = 600
    startup_timeout_s: int = 600
    device: str = "cpu"
    policy: str = DEFAULT_POLICY
    require_safety_checker: bool = False


def archive_from_bundle(
    bundle: Path, output: Path, serving: TorchServing | None = None, *, by_reference: bool = False
) -> Manifest:
    """Verifies every checksum of the bundle and writes the archive, aside first.

    Args:
        bundle: its folder.
        output: the .mar file; its name without .mar must begin with a letter or digit, followed by those, `_`, `-`, `.`.
        serving: how it is served.
        by_reference: leave the bundle where it is and name its path in the archive, so that gigabytes are neither copied
            now nor unpacked by every TorchServe that loads it.

    Raises:
        BundleError: the bundle is damaged or lacks the safety checker that `serving` requires, `output` has another ending
            or cannot be written, or torch-model-archiver failed.
    """
    if output.suffix != ".mar":
        raise BundleError(f"{output} is no name for a model archive. Give it the ending .mar.")
    serving = serving or TorchServing()
    manifest = read_manifest(bundle)
    if serving.require_safety_checker:
        refuse_without_safety_checker(manifest)
    verify(bundle, manifest)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # On the disk of the archive, since a bundle may not fit on that of temporary files.
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
            staging = Path(folder)
            _write_parts(staging, bundle, manifest, serving, by_reference)
            _run_archiver(staging, output.stem, with_bundle=not by_reference)
            (staging / output.name).replace(output)
    except OSError as error:
        raise BundleError(f"{output} cannot be written: {error}") from error
    return manifest


def archive_from_checkpoint(checkpoint: Path, output: Path, serving: TorchServing | None = None) -> Manifest:
    """Writes an archive of a checkpoint that was not exported; PyTorch runs it.

    Raises:
        CheckpointError: the checkpoint is not supported or damaged.
        BundleError: as `archive_from_bundle`.
    """
    with tempfile.TemporaryDirectory(prefix="diffuserve-eager-") as folder:
        eager_bundle_from_checkpoint(checkpoint, Path(folder))
        return archive_from_bundle(Path(folder), output, serving)


def config_from_serving(manifest: Manifest, serving: TorchServing, bundle: Path | None) -> dict[str, Any]:
    """The content of model-config.yaml: TorchServe's own keys, and under `handler` what our handler reads: the limits,
    the policy, and which bundle it must find, at `bundle` or in the archive."""
    handler: dict[str, Any] = {
        "bundle_sha256": manifest.bundle_sha256,
        "policy": serving.policy,
        **asdict(Limits.for_model(manifest.model)),
    }
    if bundle is not None:
        handler["bundle"] = str(bundle.resolve())
    return {
        "minWorkers": serving.min_workers,
        "maxWorkers": serving.max_workers,
        "batchSize": serving.batch_size,
        "maxBatchDelay": serving.max_batch_delay_ms,
        "responseTimeout": serving.response_timeout_s,
        "startupTimeout": serving.startup_timeout_s,
        "deviceType": serving.device,
        "handler": handler,
    }


def _write_parts(staging: Path, bundle: Path, manifest: Manifest, serving: TorchServing, by_reference: bool) -> None:
    import yaml

    config = config_from_serving(manifest, serving, bundle if by_reference else None)
    (staging / CONFIG_NAME).write_text(yaml.safe_dump(config, sort_keys=False))
    eager = any(component.engine == ENGINE for component in manifest.components.values())
    (staging / _HANDLER_NAME).write_text(_EAGER_HANDLER if eager else _HANDLER)
    (staging / "temporary").mkdir()
    if not by_reference:
        # Links to the manifest's files alone, whatever else lies in the bundle's folder.
        for name in (MANIFEST_NAME, *(file.path for file in manifest.all_files())):
            link = staging / "bundle" / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((bundle / name).resolve())


def _run_archiver(staging: Path, name: str, *, with_bundle: bool) -> None:
    """Runs torch-model-archiver, in a process of its own: it empties a folder of the model's name among the temporary
    files, and splits paths at commas, so it gets a place for those and only names of ours."""
    command = [sys.executable, "-m", "model_archiver.model_packaging", "--model-name", name, "--version", __version__]
    command += ["--handler", _HANDLER_NAME, "--config-file", CONFIG_NAME, "--export-path", "."]
    command += ["--archive-format", "zip-store", *(["--extra-files", "bundle"] if with_bundle else [])]
    environment = {**os.environ, "TMPDIR": str((staging / "temporary").resolve())}
    done = subprocess.run(command, cwd=staging, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last_words = " | ".join(done.stderr.strip().splitlines()[-3:])
        raise BundleError(f"torch-model-archiver could not write {name}.mar: {last_words}")
