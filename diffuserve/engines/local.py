"""The stages in this process: what `generate --local` and the benchmarks run on, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffuserve.bundle import Manifest, read_manifest, verify
from diffuserve.engines import load_engine
from diffuserve.engines.example import WARM_BATCHES, example_inputs
from diffuserve.errors import StageFailed
from diffuserve.stages import Conditioning, Engine, Float32
from diffuserve.tensors import TEXT_ENCODER, UNET, VAE_DECODER

_STAGES = (TEXT_ENCODER, UNET, VAE_DECODER)
LoadEngines = Callable[[Path, Manifest], Mapping[str, Engine]]


class LocalStages:
    """Implements `diffuserve.stages.Stages` on a bundle's engines; each stage has a thread of its own.

    Args:
        bundle: folder of an exported model.
        threads: of one call; 0 means one for each core.
        load: makes other engines than those that the manifest names, by stage.

    Raises:
        BundleError: the bundle is damaged, or an engine cannot be loaded.
    """

    def __init__(self, bundle: Path, threads: int = 0, load: LoadEngines | None = None) -> None:
        manifest = read_manifest(bundle)
        verify(bundle, manifest)
        if load is not None:
            engines = load(bundle, manifest)
            self._engines = {name: engines[name] for name in _STAGES}
        else:
            self._engines = {
                name: load_engine(bundle / manifest.components[name].files[0].path, manifest.components[name], threads)
                for name in _STAGES
            }
        self._manifest = manifest
        self._threads = {name: ThreadPoolExecutor(1, thread_name_prefix=name) for name in self._engines}

    def warm(self) -> None:
        """Runs every engine at the sizes that requests mostly have, so that the first one does not wait for it.

        Raises:
            StageFailed: an engine cannot run.
        """
        for name, engine in self._engines.items():
            tensors = self._manifest.components[name].tensors
            try:
                for batch in WARM_BATCHES:
                    engine(example_inputs(tensors, self._manifest.model, batch))
            except Exception as error:
                raise StageFailed(f"The stage {name} failed on its first call: {error}") from error

    async def encode_text(self, input_ids: Mapping[str, NDArray[np.int32]]) -> Conditioning:
        return await self._run(TEXT_ENCODER, lambda engine: engine(input_ids))

    async def denoise(self, sample: Float32, timestep: Float32, conditioning: Conditioning) -> Float32:
        inputs = {"sample": sample, "timestep": timestep[:, np.newaxis], **conditioning}
        noise_pred: Float32 = (await self._run(UNET, lambda engine: engine(inputs)))["noise_pred"]
        return noise_pred

    async def decode(self, latent_sample: Float32) -> NDArray[np.uint8]:
        outputs = await self._run(VAE_DECODER, lambda engine: engine({"latent_sample": latent_sample}))
        image: NDArray[np.uint8] = outputs["image"]
        return image

    def close(self) -> None:
        """Ends the threads once their calls have returned."""
        for pool in self._threads.values():
            pool.shutdown()

    async def _run(self, stage: str, call: Callable[[Engine], dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
        return await asyncio.get_running_loop().run_in_executor(self._threads[stage], call, self._engines[stage])
