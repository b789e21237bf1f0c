"""Engines that run exported components in this process, each imported when asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffuserve.engines.tensorrt_library import LIBRARIES
from diffuserve.errors import BundleError

if TYPE_CHECKING:
    from pathlib import Path

    from diffuserve.bundle.manifest import Component
    from diffuserve.stages import Engine

ENGINES = ("onnxruntime", "openvino", "torch", "torch-cuda", "onnxruntime-cuda", *LIBRARIES)
# Of them those whose `device` is the first GPU (`diffuserve.stages.Engine`).
ON_FIRST_GPU = ("torch-cuda",)


def load_engine(model_path: Path, component: Component, threads: int) -> Engine:
    """Loads one component.

    Args:
        model_path: the component's first file.
        component: what the manifest says of it.
        threads: threads of one call on a CPU; 0 means one for each core.

    Raises:
        BundleError: the engine is unknown or not installed, this machine cannot run it at the component's precision, or
            the file cannot be loaded.
    """
    if component.engine == "onnxruntime":
        from diffuserve.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(model_path, component, threads)
    if component.engine == "onnxruntime-cuda":
        from diffuserve.engines.onnxruntime_cuda import OnnxRuntimeCudaEngine

        return OnnxRuntimeCudaEngine(model_path, component)
    if component.engine == "openvino":
        from diffuserve.engines.openvino import OpenVinoEngine

        return OpenVinoEngine(model_path, component, threads)
    if component.engine in ("torch", "torch-cuda"):
        from diffuserve.engines.torch import TorchEngine

        return TorchEngine(model_path, component, threads)
    if component.engine in LIBRARIES:
        from diffuserve.engines.tensorrt import TensorRtEngine

        return TensorRtEngine(model_path, component)
    raise BundleError(
        f"{model_path} was made for the engine {component.engine!r}; this diffuserve has: {', '.join(ENGINES)}. Export it again."
    )
