"""Latents to images that may be shown: the VAE decoder, and after it the safety checker of a bundle that has one."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor

import numpy as np
from numpy.typing import NDArray

from diffuserve.bundle.manifest import Manifest
from diffuserve.errors import StageFailed
from diffuserve.images.safety import clip_input_from_image, flagged_from_scores
from diffuserve.limits import MAX_DECODE_BATCH
from diffuserve.stages import Array, StageCalls
from diffuserve.stats import Stats
from diffuserve.tensors import SAFETY_CHECKER

Images = NDArray[np.uint8]
Flags = NDArray[np.bool_]


class Decoder:
    """Decodes and checks; an image that is not finite, or could not be checked, is never returned.

    Args:
        manifest: the bundle's.
        calls: of the VAE decoder and the safety checker.
        workers: where images are prepared for the safety checker, off the event loop.
        stats: where images that are not finite are counted.
    """

    def __init__(
        self,
        manifest: Manifest,
        calls: StageCalls,
        workers: Executor,
        stats: Stats | None = None,
    ) -> None:
        self._manifest = manifest
        self._calls = calls
        self._workers = workers
        self._stats = stats or Stats()

    async def decode(self, latents: Array, width: int, height: int) -> tuple[Images, Flags]:
        """Args:
            latents: (n, C, h, w) float32, unit variance, wherever they are.
            width, height: pixels of the images that they make.

        Returns:
            (n, height, width, 3) uint8, RGB, those that the safety checker withholds black; and (n,) bool, which these
            are.

        Raises:
            StageFailed: the decoder or the safety checker failed, or returned something else than expected or an image
                that is not finite.
        """
        parts = [latents[first : first + MAX_DECODE_BATCH] for first in range(0, len(latents), MAX_DECODE_BATCH)]
        decoded = await asyncio.gather(*(self._decode_part(part, width, height) for part in parts))
        images, finite = (np.concatenate(arrays) for arrays in zip(*decoded, strict=True))
        self._refuse_not_finite(finite)
        checks = np.split(images, range(MAX_DECODE_BATCH, len(images), MAX_DECODE_BATCH))
        flagged = np.concatenate(await asyncio.gather(*map(self._check, checks)))
        images[flagged] = 0
        return images, flagged

    async def _decode_part(self, latents: Array, width: int, height: int) -> tuple[Images, Flags]:
        """The images, and which of them are finite."""
        images, finite = await self._calls.decode(latents)
        expected = (len(latents), height, width, 3)
        if images.shape != expected or images.dtype != np.uint8:
            raise StageFailed(
                f"The VAE decoder returned {images.dtype} {images.shape} where uint8 {expected} was expected."
            )
        if finite.shape != (len(latents),) or finite.dtype != np.bool_:
            raise StageFailed(
                f"The VAE decoder said with {finite.dtype} {finite.shape} which images are finite, where bool "
                f"{(len(latents),)} was expected."
            )
        return images, finite

    def _refuse_not_finite(self, finite: Flags) -> None:
        """Not a number would be shown as black, and infinity as white."""
        if finite.all():
            return
        count = int((~finite).sum())
        self._stats.count("images_not_finite", count)
        raise StageFailed(
            f"The VAE decoder returned values that are not finite for {count} of {len(finite)} images, which would be black or "
            "white. VAEs that overflow in fp16 do so: if it runs in fp16, select bf16 or fp32 for it, diffuserve engines "
            "BUNDLE --select ENGINE --precision PRECISION. Otherwise try another seed, or less guidance."
        )

    async def _check(self, images: Images) -> Flags:
        """Which of them the safety checker withholds."""
        processor = self._manifest.image_processor
        if processor is None:
            return np.zeros(len(images), bool)
        loop = asyncio.get_running_loop()
        prepared = await asyncio.gather(
            *(loop.run_in_executor(self._workers, clip_input_from_image, image, processor) for image in images)
        )
        scores = await self._calls.score_concepts(np.stack(prepared))
        [concepts] = self._manifest.components[SAFETY_CHECKER].tensors.outputs
        expected = (len(images), *concepts.dims)
        # Not a number is not above 0 either, and must not pass for harmless.
        if scores.shape != expected or not np.isfinite(scores).all():
            raise StageFailed(
                f"The safety checker returned {scores.dtype} {scores.shape} where finite numbers {expected} were "
                "expected, so no image is returned."
            )
        return flagged_from_scores(scores)
