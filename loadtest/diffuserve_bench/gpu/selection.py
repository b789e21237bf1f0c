"""A real bundle on each engine for GPUs: `diffuserve engines --select`, image included."""

from __future__ import annotations

from diffuserve.bundle.manifest import Manifest
from diffuserve.trials.selecting import REFERENCE, select_engines
from diffuserve_bench.gpu.model import copy_bundle
from diffuserve_bench.gpu.record import PhaseRecord, Skipped
from diffuserve_bench.gpu.settings import Settings
from diffuserve_bench.gpu.ways import ways


def measure(settings: Settings, record: PhaseRecord) -> None:
    """Selects each engine on a copy of the bundle: its image against diffusers', its trials by component.

    Raises:
        Skipped: no bundle was named.
    """
    if settings.bundle is None:
        raise Skipped("no bundle was named: --bundle BUNDLE")
    for way in ways(settings):
        with record.part(**way.settings):
            if way.lack:
                raise Skipped(way.lack)
            copy = settings.work / "bundle"
            copy_bundle(settings.bundle, copy)
            _write_down(select_engines(copy, way.engine, way.precision), record)


def _write_down(manifest: Manifest, record: PhaseRecord) -> None:
    for image in manifest.images:
        drawn_by = ", ".join(sorted(set(image.engines.values())))
        if image.psnr_db is not None:  # it is not identical
            record.figure("image, PSNR", image.psnr_db, "dB", drawn_by=drawn_by, asked_for=image.min_psnr_db)
        record.figure("image, SSIM", image.ssim, "", drawn_by=drawn_by)
    for trial in manifest.trials:
        named = {"stage": trial.component, "engine": trial.engine, "precision": trial.precision}
        for batch, seconds in trial.seconds.items():
            record.figure("call", 1000 * seconds, "ms", batch=batch, **named)
        if (trial.engine, trial.precision) != REFERENCE and trial.max_abs_error is not None:
            record.figure("largest error", trial.max_abs_error, "of " + f"{trial.tolerance:.2g}", **named)
