"""Engines that run exported components in this process, each imported when asked for."""

from __future__ import annotations

from pathlib import Path

from diffuserve.bundle import Component
from diffuserve.errors import BundleError
from diffuserve.stages import Engine

ENGINES = ("onnxruntime",)


def load_engine(model_path: Path, component: Component, threads: int) -> Engine:
    """Loads one component.

    Args:
        model_path: the component's first file.
        component: what the manifest says of it.
        threads: threads of one call; 0 means one for each core.

    Raises:
        BundleError: the engine is unknown or not installed, or the file cannot be loaded.
    """
    if component.engine == "onnxruntime":
        from diffuserve.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(model_path, threads)
    raise BundleError(
        f"{model_path} was made for the engine {component.engine!r}; this diffuserve has: {', '.join(ENGINES)}. Export it again."
    )
