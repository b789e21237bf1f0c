"""The first calls of an engine, before anybody waits for one."""

from __future__ import annotations

import msgspec

from diffuserve.bundle.manifest import Component, ModelSpec
from diffuserve.engines.example_inputs import WARM_BATCHES, example_inputs
from diffuserve.engines.tensorrt_library import LIBRARIES
from diffuserve.stages import Engine

# On a GPU, libraries choose kernels by shape and load them at the first call. A CPU's have little to prepare, and a call
# at the native size takes it minutes for large models.
_ON_GPU = ("onnxruntime-cuda", "torch-cuda", *LIBRARIES)


def warm(engine: Engine, component: Component, model: ModelSpec, most_rows: int = WARM_BATCHES[-1]) -> None:
    """Runs a component's engine: on a GPU at the native size on every power of two of rows up to `most_rows`, each of which
    it may prepare anew, and twice, since CUDA graphs are recorded at the second call; on a CPU on one and two rows at the
    smallest size. Whatever the engine raises passes through: it could not serve either."""
    batches: tuple[int, ...] = WARM_BATCHES
    if component.engine in _ON_GPU:
        batches = tuple(1 << power for power in range(most_rows.bit_length()) for _ in range(2))
    else:
        model = msgspec.structs.replace(model, width=model.size_multiple, height=model.size_multiple)
    for batch in batches:
        engine(example_inputs(component.tensors, model, batch))
