"""The Triton backends that can run the stages.

The Triton that installs from the package index has only the Python backend, in which diffuserve's own engines run. The
one in NVIDIA's container also has backends in C++ that load the same files themselves. The in-flight loop is a Python
model in either case. No server has loaded these configurations yet, only Triton's own parser: see docs/engines.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffuserve.engines import ENGINES
from diffuserve.errors import BundleError

if TYPE_CHECKING:
    from diffuserve.bundle.manifest import Component, ModelSpec

PYTHON = "python"
# The backends, and the engines whose components each runs.
BACKENDS = {
    PYTHON: ENGINES,
    "onnxruntime": ("onnxruntime", "onnxruntime-cuda", "openvino"),
    "openvino": ("onnxruntime", "openvino"),
    "tensorrt": ("tensorrt",),
}


def set_backend(config: Any, backend: str, component: Component, model: ModelSpec, instances: int) -> None:
    """Makes a stage's `ModelConfig` one for a backend of NVIDIA's container.

    Args:
        config: is changed.
        backend: one of `BACKENDS` but PYTHON.
        component: the stage's.
        model: the bundle's.
        instances: how many calls run at a time: for onnxruntime one on each GPU, for openvino all on the CPU.

    Raises:
        BundleError: the backend does not run the component's engine.
    """
    if component.engine not in BACKENDS[backend]:
        raise BundleError(
            f"{config.name} runs on {component.engine}, and Triton's backend {backend} runs "
            f"{' and '.join(BACKENDS[backend])}. Select another engine: diffuserve engines BUNDLE --select "
            f"{BACKENDS[backend][0]}"
        )
    config.backend = backend
    config.default_model_filename = component.files[0].path.rpartition("/")[2]
    (group,) = config.instance_group
    if backend == "openvino":
        group.count = instances
        config.parameters["PERFORMANCE_HINT"].string_value = "LATENCY"
        # The graph takes any batch. Without this the backend would fix it at max_batch_size.
        config.parameters["SKIP_OV_DYNAMIC_BATCHSIZE"].string_value = "YES"
        if component.precision == "bf16":
            config.parameters["HINT_BF16"].string_value = "YES"
    else:
        group.kind = group.KIND_GPU
        group.gpus.extend(range(instances))
    if backend == "onnxruntime":
        from diffuserve.engines.onnxruntime_cuda import cuda_options

        accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="cuda")
        accelerator.parameters.update(cuda_options(component.precision))
    if backend == "tensorrt":
        _use_profiles(config, component, model)
    _warm(config, component, model)


def _use_profiles(config: Any, component: Component, model: ModelSpec) -> None:
    """All of a plan's profiles, and a CUDA graph for each small batch of the native size."""
    from diffuserve.engines.tensorrt_profiles import MOST_GRAPH_ROWS, has_one_size, profiles_of

    ranges = profiles_of(component, model)
    config.instance_group[0].profile.extend(str(number) for number in range(len(ranges)))
    config.optimization.cuda.graphs = True
    for profile in filter(has_one_size, ranges):
        (least,), (most,) = ({getattr(each, end)[0] for each in profile.values()} for end in ("min", "max"))
        for batch in range(least, min(most, MOST_GRAPH_ROWS) + 1):
            spec = config.optimization.cuda.graph_spec.add(batch_size=batch)
            for name, shapes in profile.items():
                spec.input[name].dim.extend(shapes.opt[1:])
    if not all(map(has_one_size, ranges)):
        # Large images have profiles of fewer rows than `max_batch_size`, which calls are split for; Triton must not put
        # them together again.
        config.ClearField("dynamic_batching")


def _warm(config: Any, component: Component, model: ModelSpec) -> None:
    """Calls at the native size that Triton makes before it calls the model ready."""
    from diffuserve.engines.example_inputs import WARM_BATCHES, native_sizes

    for batch in WARM_BATCHES:
        warmup = config.model_warmup.add(name=f"rows_{batch}", batch_size=batch)
        for spec, tensor in zip(component.tensors.inputs, config.input, strict=True):
            example = warmup.inputs[spec.name]
            example.data_type = tensor.data_type
            example.dims.extend(spec.shape(1, native_sizes(model))[1:])
            example.zero_data = True
