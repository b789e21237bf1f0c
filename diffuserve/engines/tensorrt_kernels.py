"""Kernels that TensorRT for RTX compiles on the card when a plan is loaded, kept on disk for the next start.

A plan for RTX has no kernels for a card. Those that take any shape are compiled with each context; those for one shape
follow in the background of its first calls, which the others answer. The first kind is kept, so that a start need not
wait for it; the second is compiled again. This has run with a library that is none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffuserve.engines.compiled_cache import CompiledCache

_NAME = "kernels"


class CompiledKernels:
    """Those of one plan's contexts.

    `settings`: an `IRuntimeConfig`, of which all contexts are to be made. TensorRT for RTX captures their CUDA graphs itself:
    it alone knows when it replaces a kernel.

    Args:
        module: `tensorrt_rtx`, or one with the same interface.
        engine: the plan, an `ICudaEngine`.
        memory: an `ExecutionContextAllocationStrategy`.
        cache: where kernels are kept. Those of another card or driver are refused by the library, and replaced.
    """

    def __init__(self, module: Any, engine: Any, memory: Any, cache: CompiledCache) -> None:
        self._cache = cache
        self.settings = engine.create_runtime_config()
        self.settings.set_execution_context_allocation_strategy(memory)
        self.settings.cuda_graph_strategy = module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._kernels = self.settings.create_runtime_cache()
        self._are_kept = cache.loaded(self._read, OSError, ValueError) is not None
        self.settings.set_runtime_cache(self._kernels)

    def store(self) -> None:
        """Keeps what was compiled since, unless it was read."""
        if self._are_kept:
            return
        with self._cache.writing() as folder:
            if folder is not None:
                (folder / _NAME).write_bytes(self._kernels.serialize())
                self._are_kept = True

    def _read(self, entry: Path) -> bool:
        if not self._kernels.deserialize((entry / _NAME).read_bytes()):
            raise ValueError("they are of another card, driver or version")
        return True
