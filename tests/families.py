"""A tiny checkpoint of each family beyond Stable Diffusion 1, its bundle, and diffusers' own pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from diffuserve.bundle.manifest import Manifest, read_manifest
from diffuserve_export.export import bundle_from_checkpoint
from diffuserve_export.quiet import quiet
from tests.export.tiny import WRITERS

FAMILIES = ("sd2", "sdxl", "lcm")


@dataclass(frozen=True)
class Family:
    """`name`: one of `FAMILIES`."""

    name: str
    checkpoint: Path
    bundle: Path

    @property
    def manifest(self) -> Manifest:
        return read_manifest(self.bundle)

    @cached_property
    def pipeline(self) -> Any:
        """diffusers' pipeline in fp32, with the scheduler that our "ddim" is; quiet."""
        with quiet():
            import diffusers

            pipeline = diffusers.DiffusionPipeline.from_pretrained(self.checkpoint, local_files_only=True)
            if isinstance(pipeline, diffusers.LatentConsistencyModelPipeline):
                # It samples with LCMScheduler only; this one conditions its UNet in the same way and takes any scheduler.
                scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
                pipeline = diffusers.StableDiffusionPipeline(
                    **{**pipeline.components, "scheduler": scheduler}, requires_safety_checker=False
                )
            pipeline.set_progress_bar_config(disable=True)
        return pipeline


def make_family(name: str, folder: Path) -> Family:
    """Writes and exports one below `folder`; about half a minute."""
    checkpoint = WRITERS[name](folder / f"tiny-{name}")
    return Family(name, checkpoint, bundle_from_checkpoint(checkpoint, folder / "bundle"))
