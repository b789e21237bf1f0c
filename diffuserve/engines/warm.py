"""The first calls of an engine, before anybody waits for one."""

from __future__ import annotations

import msgspec

from diffuserve.bundle.manifest import Component, ModelSpec
from diffuserve.engines.example_inputs import WARM_BATCHES, example_inputs
from diffuserve.engines.tensorrt_library import LIBRARIES
from diffuserve.stages import Engine

# On a GPU, libraries choose kernels by shape and load them at the first call. A CPU's have little to prepare, and a call
# at the native size takes it minutes for large models.
_ON_GPU = ("onnxruntime-cuda", *LIBRARIES)


def warm(engine: Engine, component: Component, model: ModelSpec) -> None:
    """Runs a component's engine on one and two rows: at the native size on a GPU, at the smallest one on a CPU. Whatever
    the engine raises passes through: it could not serve either."""
    if component.engine not in _ON_GPU:
        model = msgspec.structs.replace(model, width=model.size_multiple, height=model.size_multiple)
    for batch in WARM_BATCHES:
        engine(example_inputs(component.tensors, model, batch))
