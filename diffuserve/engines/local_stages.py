"""The stages in this process: what `generate --local` and the benchmarks run on, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffuserve.bundle.checksums import verify
from diffuserve.bundle.manifest import Manifest, read_manifest
from diffuserve.engines import load_engine
from diffuserve.engines.warm import warm
from diffuserve.errors import StageFailed
from diffuserve.stages import Conditioning, Engine, Float32
from diffuserve.tensors import CLIP_INPUT, CONCEPT_SCORES, FINITE, SAFETY_CHECKER, TEXT_ENCODER, UNET, VAE_DECODER

# Those that an image passes.
_STAGES = (TEXT_ENCODER, UNET, VAE_DECODER, SAFETY_CHECKER)
LoadEngines = Callable[[Path, Manifest], Mapping[str, Engine]]


class EngineStages:
    """Implements `diffuserve.stages.Stages` on engines, by stage; each stage has a thread of its own."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._engines = engines
        self._threads = {name: ThreadPoolExecutor(1, thread_name_prefix=name) for name in engines}

    async def encode_text(self, input_ids: Mapping[str, NDArray[np.int32]]) -> Conditioning:
        return await self._run(TEXT_ENCODER, lambda engine: engine(input_ids))

    async def denoise(self, sample: Float32, timestep: Float32, conditioning: Conditioning) -> Float32:
        inputs = {"sample": sample, "timestep": timestep[:, np.newaxis], **conditioning}
        noise_pred: Float32 = (await self._run(UNET, lambda engine: engine(inputs)))["noise_pred"]
        return noise_pred

    async def decode(self, latent_sample: Float32) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        outputs = await self._run(VAE_DECODER, lambda engine: engine({"latent_sample": latent_sample}))
        return outputs["image"], outputs[FINITE][:, 0]

    async def score_concepts(self, clip_input: Float32) -> Float32:
        outputs = await self._run(SAFETY_CHECKER, lambda engine: engine({CLIP_INPUT: clip_input}))
        scores: Float32 = outputs[CONCEPT_SCORES]
        return scores

    def close(self) -> None:
        """Ends the threads once their calls have returned."""
        for pool in self._threads.values():
            pool.shutdown()

    async def _run(self, stage: str, call: Callable[[Engine], dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
        return await asyncio.get_running_loop().run_in_executor(
            self._threads[stage], lambda: call(self._engines[stage])
        )


class LocalStages(EngineStages):
    """A bundle's engines.

    Args:
        bundle: folder of an exported model.
        load: makes other engines than those that the manifest names, by stage.

    Raises:
        BundleError: the bundle is damaged, or an engine cannot be loaded.
    """

    def __init__(self, bundle: Path, load: LoadEngines | None = None) -> None:
        self._manifest = read_manifest(bundle)
        verify(bundle, self._manifest)
        components = {name: self._manifest.components[name] for name in _STAGES if name in self._manifest.components}
        if load is not None:
            engines = load(bundle, self._manifest)
            super().__init__({name: engines[name] for name in components})
        else:
            super().__init__(
                {
                    name: load_engine(bundle / component.files[0].path, component, threads=0)
                    for name, component in components.items()
                }
            )

    def warm(self) -> None:
        """Runs every engine, so that the first request finds that it can.

        Raises:
            StageFailed: an engine cannot run.
        """
        for name, engine in self._engines.items():
            try:
                warm(engine, self._manifest.components[name], self._manifest.model)
            except Exception as error:
                raise StageFailed(f"The stage {name} failed on its first call: {error}") from error
