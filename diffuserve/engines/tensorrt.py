"""Components on TensorRT, in this process. It has never run, since no NVIDIA GPU was at hand; see docs/engines.md."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffuserve.engines.tensorrt_plan import check_plan
from diffuserve.errors import BundleError, StageFailed


class TensorRtEngine:
    """One plan on the first GPU. Calls from several threads run one after another.

    Args:
        path: the .plan file.

    Raises:
        BundleError: tensorrt or cuda-python is not installed, or the plan was built for another GPU or version.
    """

    def __init__(self, path: Path) -> None:
        check_plan(path)
        try:
            import tensorrt
            from cuda.bindings import runtime as cuda
        except ImportError as error:
            raise BundleError(
                "The engine tensorrt is not installed. Install it: pip install 'diffuserve[tensorrt]'"
            ) from error

        self._cuda = cuda
        self._runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.WARNING))
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise BundleError(f"TensorRT cannot load {path}; its own messages above say why.")
        names = [self._engine.get_tensor_name(at) for at in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT for name in names}
        self._dtypes = {name: np.dtype(tensorrt.nptype(self._engine.get_tensor_dtype(name))) for name in names}
        self._inputs = [name for name in names if is_input[name]]
        self._outputs = [name for name in names if not is_input[name]]
        # Memory for the profile in use only: the last one allows for the largest batch of the largest images.
        strategy = tensorrt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        self._context = self._engine.create_execution_context(strategy)
        self._stream = self._checked(cuda.cudaStreamCreate())
        self._profile = -1
        self._lock = threading.Lock()

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs the model; see `diffuserve.stages.Engine`.

        Raises:
            ValueError: an input is missing, unknown or of another dtype.
            StageFailed: no profile allows the inputs' shapes, or CUDA failed.
        """
        dtypes = {name: array.dtype for name, array in inputs.items()}
        if dtypes != {name: self._dtypes[name] for name in self._inputs}:
            raise ValueError(
                f"The inputs are {dtypes}; expected: { ({name: self._dtypes[name] for name in self._inputs}) }."
            )
        with self._lock:
            buffers: list[int] = []
            try:
                return self._run({name: np.ascontiguousarray(array) for name, array in inputs.items()}, buffers)
            finally:
                for buffer in buffers:
                    self._cuda.cudaFreeAsync(buffer, self._stream)

    def _run(self, inputs: Mapping[str, NDArray[Any]], buffers: list[int]) -> dict[str, NDArray[Any]]:
        """`buffers` gets every piece of the GPU's memory that is taken."""
        kinds = self._cuda.cudaMemcpyKind
        self._choose_profile({name: array.shape for name, array in inputs.items()})

        def on_gpu(name: str, array: NDArray[Any]) -> int:
            buffer: int = self._checked(self._cuda.cudaMallocAsync(array.nbytes, self._stream))
            buffers.append(buffer)
            self._context.set_tensor_address(name, buffer)
            return buffer

        for name, array in inputs.items():
            self._context.set_input_shape(name, array.shape)
            buffer = on_gpu(name, array)
            self._checked(
                self._cuda.cudaMemcpyAsync(
                    buffer, array.ctypes.data, array.nbytes, kinds.cudaMemcpyHostToDevice, self._stream
                )
            )
        outputs = {
            name: np.empty(tuple(self._context.get_tensor_shape(name)), self._dtypes[name]) for name in self._outputs
        }
        places = {name: on_gpu(name, array) for name, array in outputs.items()}
        if not self._context.execute_async_v3(int(self._stream)):
            raise StageFailed("TensorRT could not run the call; its own messages above say why.")
        for name, array in outputs.items():
            self._checked(
                self._cuda.cudaMemcpyAsync(
                    array.ctypes.data, places[name], array.nbytes, kinds.cudaMemcpyDeviceToHost, self._stream
                )
            )
        self._checked(self._cuda.cudaStreamSynchronize(self._stream))
        return outputs

    def _choose_profile(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """The first profile that allows the shapes: those made for one shape come first."""
        for number in range(self._engine.num_optimization_profiles):
            ranges = {name: self._engine.get_tensor_profile_shape(name, number) for name in shapes}
            if all(
                all(
                    low <= side <= high for low, side, high in zip(ranges[name][0], shape, ranges[name][2], strict=True)
                )
                for name, shape in shapes.items()
            ):
                break
        else:
            raise StageFailed(f"The plan was not built for inputs of the shapes {dict(shapes)}.")
        if number != self._profile:
            self._context.set_optimization_profile_async(number, int(self._stream))
            self._checked(self._cuda.cudaStreamSynchronize(self._stream))
            self._profile = number

    def _checked(self, result: tuple[Any, ...]) -> Any:
        """The value of a CUDA call, which returns an error code before it."""
        error, *values = result
        if error != self._cuda.cudaError_t.cudaSuccess:
            raise StageFailed(f"CUDA failed: {error}")
        return values[0] if values else None
