"""A bundle to a model archive for TorchServe.

tiny-emoji.mar
    MAR-INF/MANIFEST.json       torch-model-archiver's
    model-config.yaml           how TorchServe serves it, and what the handler is told
    diffuserve_handler.py       a few lines that import the class from the package
    manifest.json, unet/ ...    the bundle, unless it is referred to by its path
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffuserve import __version__
from diffuserve.bundle.checksums import verify
from diffuserve.bundle.manifest import MANIFEST_NAME, Manifest, read_manifest
from diffuserve.defaults import BATCH_TIMEOUT_S
from diffuserve.engines.tensorrt_profiles import check_limits
from diffuserve.errors import BundleError, ConfigurationError
from diffuserve.images.safety import refuse_without_safety_checker
from diffuserve.limits import Limits
from diffuserve.options import to_parameters
from diffuserve.serving_options import Serving
from diffuserve_export.graphs.eager import ENGINE, eager_bundle_from_checkpoint
from diffuserve_export.repository.torchserve_options import TorchServing

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


def archive_from_bundle(
    bundle: Path,
    output: Path,
    limits: Limits | None = None,
    serving: Serving | None = None,
    *,
    torchserve: TorchServing | None = None,
    by_reference: bool = False,
) -> Manifest:
    """Verifies every checksum of the bundle and writes the archive, aside first.

    Args:
        bundle: its folder.
        output: the .mar file; its name without .mar must begin with a letter or digit, followed by those, `_`, `-`, `.`.
        limits: what is accepted; by default the model's own.
        serving: how it is served. Its `call_timeout_s` is what a whole batch may take.
        torchserve: what TorchServe itself is told.
        by_reference: leave the bundle where it is and name its path in the archive, so that gigabytes are neither copied
            now nor unpacked by every TorchServe that loads it.

    Raises:
        BundleError: the bundle is damaged or lacks the safety checker that `serving` requires, `output` has another ending
            or cannot be written, or torch-model-archiver failed.
        ConfigurationError: a batch may have more requests than may wait, or the limits allow what the bundle's TensorRT plans
            were not built for.
    """
    if output.suffix != ".mar":
        raise BundleError(f"{output} is not a name for a model archive. Give it the ending .mar.")
    serving = serving or Serving(call_timeout_s=BATCH_TIMEOUT_S)
    manifest = read_manifest(bundle)
    limits = limits or Limits.for_model(manifest.model)
    check_limits(limits, manifest)
    config = config_from_options(
        manifest,
        limits,
        serving,
        torchserve or TorchServing(),
        bundle if by_reference else None,
    )
    if serving.require_safety_checker:
        refuse_without_safety_checker(manifest)
    verify(bundle, manifest)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # On the disk of the archive, since a bundle may not fit on that of temporary files.
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
            staging = Path(folder)
            _write_parts(staging, bundle, manifest, config, by_reference)
            _run_archiver(staging, output.stem, with_bundle=not by_reference)
            (staging / output.name).replace(output)
    except OSError as error:
        raise BundleError(f"{output} cannot be written: {error}") from error
    return manifest


@contextmanager
def bundle_of_checkpoint(checkpoint: Path) -> Iterator[Path]:
    """A bundle, for as long as the block lasts, of a checkpoint that was not exported; PyTorch runs it.

    Raises:
        CheckpointError: the checkpoint is not supported or damaged.
    """
    with tempfile.TemporaryDirectory(prefix="diffuserve-eager-") as folder:
        eager_bundle_from_checkpoint(checkpoint, Path(folder))
        yield Path(folder)


def config_from_options(
    manifest: Manifest, limits: Limits, serving: Serving, torchserve: TorchServing, bundle: Path | None
) -> dict[str, Any]:
    """The content of model-config.yaml: TorchServe's own keys, and under `handler` what our handler reads: its parameters,
    and which bundle it must find, at `bundle` or in the archive.

    Raises:
        ConfigurationError: a batch may have more requests than may wait.
    """
    if torchserve.batch_size > limits.max_waiting_requests:
        raise ConfigurationError(
            f"TorchServe's batches have up to {torchserve.batch_size} requests, and max_waiting_requests is "
            f"{limits.max_waiting_requests}, so that some would be refused. Raise the limit, or give a smaller --batch-size."
        )
    handler: dict[str, Any] = {
        "bundle_sha256": manifest.bundle_sha256,
        "parameters": to_parameters(limits, serving),
    }
    if bundle is not None:
        handler["bundle"] = str(bundle.resolve())
    return {
        **torchserve.to_config(),
        # An engine that hangs cannot be interrupted, so a worker whose batch hangs is ended, and another started.
        "responseTimeout": math.ceil(serving.call_timeout_s),
        "handler": handler,
    }


def _write_parts(staging: Path, bundle: Path, manifest: Manifest, config: dict[str, Any], by_reference: bool) -> None:
    import yaml

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
