"""Components on OpenVINO's CPU plugin, in this process."""

from __future__ import annotations

import queue
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffuserve.bundle.manifest import Component
from diffuserve.engines.compiled_cache import CompiledCache
from diffuserve.engines.dtypes import check_dtypes
from diffuserve.engines.processor import refuse_without_bf16, usable_cores
from diffuserve.errors import BundleError

# What OpenVINO computes in, by a component's precision. Without it OpenVINO decides by the processor, so that the same
# bundle would draw other images on another machine.
PRECISION_HINTS = {"fp32": "f32", "bf16": "bf16"}


_DEVICE = "CPU"
_BLOB_NAME = "model.blob"


class OpenVinoEngine:
    """One ONNX model on the CPU, its weights held once.

    An infer request serves one call at a time, so a call takes a free one or makes another; they share the compiled
    model.

    Args:
        path: the .onnx file; weights beside it are found by their names.
        component: what the manifest says of it; its precision is "fp32" or "bf16".
        threads: threads of one call; 0 means one for each core.

    Raises:
        BundleError: openvino is not installed, the processor does not compute in the component's precision, or OpenVINO
            cannot load the file.
    """

    def __init__(self, path: Path, component: Component, threads: int = 0) -> None:
        try:
            import openvino  # noqa: F401 - asked for here, so that one message tells how to install it
        except ImportError as error:
            raise BundleError(
                "The engine openvino is not installed. Install it: pip install 'diffuserve[openvino]'"
            ) from error

        check_precision(component.precision)
        try:
            self._compiled = _compiled_model(path, component, cpu_properties(component.precision, threads))
            ports = {name: port for port in self._compiled.inputs for name in port.names}
            self._dtypes = {
                spec.name: np.dtype(ports[spec.name].element_type.to_dtype()) for spec in component.tensors.inputs
            }
            # By position, since a port that is named by two tensors answers to one of its names only.
            self._outputs = {
                spec.name: next(at for at, port in enumerate(self._compiled.outputs) if spec.name in port.names)
                for spec in component.tensors.outputs
            }
        except Exception as error:  # openvino raises RuntimeError for everything
            raise BundleError(f"OpenVINO cannot load {path}: {error}") from error
        self._free: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs the model; see `diffuserve.stages.Engine`.

        Raises:
            ValueError: an input is missing, unknown or of another dtype. OpenVINO itself would convert it, or take the
                last call's in its place.
        """
        check_dtypes(inputs, self._dtypes)
        try:
            request = self._free.get_nowait()
        except queue.Empty:
            request = self._compiled.create_infer_request()
        try:
            # The inputs are read where they are, and the outputs copied before another call can write over them.
            results = request.infer(dict(inputs), share_inputs=True, share_outputs=False)
            return {name: results[at] for name, at in self._outputs.items()}
        finally:
            self._free.put(request)


def _compiled_model(path: Path, component: Component, properties: Mapping[str, Any]) -> Any:
    """An `openvino.CompiledModel`, from the cache if it is there; `properties`: OpenVINO's, by name."""
    import openvino

    core = openvino.Core()
    cache = CompiledCache(path, component, openvino.get_version(), properties)

    def load(entry: Path) -> Any:
        return core.import_model((entry / _BLOB_NAME).read_bytes(), _DEVICE, dict(properties))

    if (kept := cache.loaded(load, OSError, RuntimeError)) is not None:
        return kept
    compiled = core.compile_model(path, _DEVICE, dict(properties))
    with cache.writing() as folder:
        if folder is not None:
            (folder / _BLOB_NAME).write_bytes(compiled.export_model().getbuffer())
    return compiled


def cpu_properties(precision: str, threads: int) -> dict[str, Any]:
    """What every model is compiled with.

    Args:
        precision: one of `PRECISION_HINTS`.
        threads: of one call; 0 means one for each core.
    """
    return {
        "INFERENCE_PRECISION_HINT": PRECISION_HINTS[precision],
        # One call at a time on all threads, as the loop makes them.
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads or usable_cores(),
        # Several models share the cores, and threads that are bound to the same core would wait for each other.
        "ENABLE_CPU_PINNING": False,
        # On processors with AVX-512 what OpenVINO 2026.4 keeps of a UNet's first call at a small size is wrong for others,
        # and noise is drawn. Without it a call of another size than the last is prepared anew, which docs/engines.md times.
        "CPU_RUNTIME_CACHE_CAPACITY": 0,
    }


def check_precision(precision: str) -> None:
    """Raises:
    BundleError: OpenVINO on this processor does not compute in `precision`.
    """
    if precision not in PRECISION_HINTS:
        raise BundleError(
            f"The engine openvino runs {' and '.join(PRECISION_HINTS)} on a CPU, and the component asks for {precision!r}. "
            "Choose another: diffuserve engines BUNDLE --select openvino --precision fp32"
        )
    if precision == "bf16":
        refuse_without_bf16("which the component asks for")
