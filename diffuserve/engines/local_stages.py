"""The stages in this process: what `generate --local` and the benchmarks run on, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffuserve.bundle.checksums import verify
from diffuserve.bundle.manifest import Manifest, read_manifest
from diffuserve.engines import load_engine
from diffuserve.engines.warm import warm
from diffuserve.errors import StageFailed
from diffuserve.limits import Limits
from diffuserve.stages import Array, ArraysByName, Engine, device_of, on_host
from diffuserve.tensors import SAFETY_CHECKER, TEXT_ENCODER, UNET, VAE_DECODER

if TYPE_CHECKING:
    import torch

# Those that an image passes.
_STAGES = (TEXT_ENCODER, UNET, VAE_DECODER, SAFETY_CHECKER)
LoadEngines = Callable[[Path, Manifest], Mapping[str, Engine]]


class EngineStages:
    """Implements `diffuserve.stages.Stages` on engines, by stage; each stage has a thread of its own."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._engines = engines
        self._threads = {name: ThreadPoolExecutor(1, thread_name_prefix=name) for name in engines}

    @property
    def unet_device(self) -> torch.device | None:
        return device_of(self._engines[UNET]) if UNET in self._engines else None

    async def run(self, stage: str, inputs: ArraysByName) -> ArraysByName:
        return await asyncio.get_running_loop().run_in_executor(self._threads[stage], self._run, stage, inputs)

    def _run(self, stage: str, inputs: ArraysByName) -> ArraysByName:
        engine = self._engines[stage]
        device = device_of(engine)
        outputs = engine({name: array if _lies_on(array, device) else on_host(array) for name, array in inputs.items()})
        return outputs if stage == UNET else {name: on_host(array) for name, array in outputs.items()}

    def close(self) -> None:
        """Ends the threads once their calls have returned."""
        for pool in self._threads.values():
            pool.shutdown()


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
        model = self._manifest.model
        most_rows = {UNET: Limits.for_model(model).max_rows}
        for name, engine in self._engines.items():
            try:
                warm(engine, self._manifest.components[name], model, most_rows.get(name, 1))
            except Exception as error:
                raise StageFailed(f"The stage {name} failed on its first call: {error}") from error


def _lies_on(array: Array, device: torch.device | None) -> bool:
    if device is None or isinstance(array, np.ndarray):
        return False
    return bool(array.device.type == device.type and device.index in (None, array.device.index))
