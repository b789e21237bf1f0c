"""A bundle's reference image, drawn by its engines: how far all of them together are from diffusers in fp32."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffuserve.bundle.manifest import Component, ImageParity, Manifest
from diffuserve.engines import load_engine
from diffuserve.engines.local_stages import EngineStages
from diffuserve.events import Completed
from diffuserve.limits import Limits
from diffuserve.pipeline import Pipeline
from diffuserve.request import request_from_fields
from diffuserve.stages import ArraysByName, Engine
from diffuserve.tensors import CLIP_INPUT, CONCEPT_SCORES, SAFETY_CHECKER, TEXT_ENCODER, UNET, VAE_DECODER
from diffuserve.trials.similarity import psnr_db, ssim
from diffuserve.trials.tolerance import min_image_psnr_db

_DRAWING = (TEXT_ENCODER, UNET, VAE_DECODER)


def image_parity(bundle: Path, manifest: Manifest, components: Mapping[str, Component]) -> ImageParity:
    """Draws the reference image and compares it.

    Args:
        bundle: its folder, with its manifest.
        manifest: the bundle's.
        components: by stage, on the engines to draw with; their files lie in `bundle`.

    Raises:
        BundleError: an engine cannot be loaded.
        StageFailed: an engine fails.
    """
    reference = np.asarray(Image.open(bundle / manifest.reference.file.path).convert("RGB"))
    image = draw_reference(bundle, manifest, components)
    psnr = psnr_db(image, reference)
    return ImageParity(
        engines=_engines_of(components),
        psnr_db=None if math.isinf(psnr) else psnr,
        ssim=ssim(image, reference),
        min_psnr_db=min_image_psnr_db(components[stage].precision for stage in _DRAWING),
    )


def same_engines(image: ImageParity, components: Mapping[str, Component]) -> bool:
    """Whether these components would draw the image in the same way."""
    return image.engines == _engines_of(components)


def _engines_of(components: Mapping[str, Component]) -> dict[str, str]:
    return {stage: f"{components[stage].engine} {components[stage].precision}" for stage in _DRAWING}


def draw_reference(bundle: Path, manifest: Manifest, components: Mapping[str, Component]) -> NDArray[np.uint8]:
    """The image that the reference image's request gives, (H, W, 3) uint8; arguments and errors as `image_parity`."""
    concepts = components[SAFETY_CHECKER].tensors.outputs[0].triton_dims[0] if SAFETY_CHECKER in components else 0
    drawing = {stage: components[stage] for stage in _DRAWING}
    return asyncio.run(_draw(bundle, manifest, _Unchecked(_OneEngineAtATime(bundle, drawing), concepts)))


async def _draw(bundle: Path, manifest: Manifest, stages: _Unchecked) -> NDArray[np.uint8]:
    fields: dict[str, Any] = msgspec.structs.asdict(manifest.reference)
    del fields["file"]
    pipeline = Pipeline(bundle, stages)
    try:
        request = request_from_fields(fields, manifest.model, Limits.for_model(manifest.model))
        async for event in pipeline.generate(request):
            if isinstance(event, Completed):
                pixels: NDArray[np.uint8] = event.pixels[0]
                return pixels
        raise RuntimeError("The pipeline ended without an image.")
    finally:
        await pipeline.close()
        stages.close()


class _Unchecked(EngineStages):
    """Engines without the safety checker: compared is what is drawn, not whether it may be shown."""

    def __init__(self, engines: Mapping[str, Engine], concepts: int) -> None:
        super().__init__(engines)
        self._concepts = concepts

    @property
    def unet_device(self) -> None:
        """The host, whatever the engine: to ask it would load it before its turn."""
        return None

    async def run(self, stage: str, inputs: ArraysByName) -> ArraysByName:
        if stage == SAFETY_CHECKER:
            return {CONCEPT_SCORES: np.full((len(inputs[CLIP_INPUT]), self._concepts), -1, np.float32)}
        return await super().run(stage, inputs)


class _OneEngineAtATime(Mapping[str, Engine]):
    """Loads an engine when its stage comes, and drops the one before: an image takes no more memory than its largest
    component does."""

    def __init__(self, bundle: Path, components: Mapping[str, Component]) -> None:
        self._bundle = bundle
        self._components = components
        self._loaded: tuple[str, Engine] | None = None

    def __getitem__(self, stage: str) -> Engine:
        if self._loaded is None or self._loaded[0] != stage:
            component = self._components[stage]
            self._loaded = None
            self._loaded = (stage, load_engine(self._bundle / component.files[0].path, component, threads=0))
        return self._loaded[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._components)

    def __len__(self) -> int:
        return len(self._components)
