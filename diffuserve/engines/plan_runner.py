"""Calls of a TensorRT plan: which profile, which memory, and CUDA graphs. It has run with a plan and a GPU that are none."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from diffuserve.engines.cuda import Bytes, Gpu
from diffuserve.engines.dtypes import check_dtypes
from diffuserve.engines.example_inputs import Arrays
from diffuserve.engines.row_pieces import join_rows, split_rows
from diffuserve.engines.tensorrt_profiles import MOST_GRAPH_ROWS, Profile, has_one_size, most_rows, profile_for
from diffuserve.errors import StageFailed
from diffuserve.tensors import NUMPY_DTYPE, StageSpec

log = logging.getLogger(__name__)

Shape = tuple[int, ...]


class PlanContext(Protocol):
    """What is asked of TensorRT's `IExecutionContext`, which is set to one profile and manages no memory itself. False
    means that it refuses."""

    def set_input_shape(self, name: str, shape: Shape) -> bool: ...
    def get_tensor_shape(self, name: str) -> Sequence[int]: ...
    def set_tensor_address(self, name: str, memory: int) -> bool: ...
    def update_device_memory_size_for_shapes(self) -> int: ...
    def set_device_memory(self, memory: int, size: int) -> None: ...
    def execute_async_v3(self, stream_handle: int) -> bool: ...


class PlanRunner:
    """Calls from several threads run one after another.

    Memory is kept from call to call and grows to the largest so far, since getting it takes longer than a small call: for
    each tensor on the GPU and page-locked on the host, and one piece for all that the plan computes in between, which all
    contexts share. A shape of few rows at the native size gets a CUDA graph at its first call, which the next ones launch
    as a whole. A graph is captured from a context of its own, which is never told anything else: NVIDIA advises so, since
    what a graph does is not defined once its context has changed. A graph holds addresses, so all are dropped when memory
    moves.

    Args:
        tensors: the component's.
        ranges: the plan's profiles.
        make_context: a new context, set to the profile of that number.
        gpu: where the contexts run.
        captures: whether CUDA graphs are to be captured here. TensorRT for RTX does so itself.
    """

    def __init__(
        self,
        tensors: StageSpec,
        ranges: Sequence[Profile],
        make_context: Callable[[int], PlanContext],
        gpu: Gpu,
        *,
        captures: bool = True,
    ) -> None:
        self._dtypes = {spec.name: np.dtype(NUMPY_DTYPE[spec.dtype]) for spec in (*tensors.inputs, *tensors.outputs)}
        self._inputs = [spec.name for spec in tensors.inputs]
        self._outputs = [spec.name for spec in tensors.outputs]
        self._profiles = ranges
        self._make_context = make_context
        self._contexts = [make_context(number) for number in range(len(ranges))]
        self._gpu = gpu
        self._memory = {name: _TensorMemory(gpu) for name in self._dtypes}
        self._workspace = _GpuMemory(gpu)
        self._graphs: dict[tuple[Shape, ...], _Graph] = {}
        self._captures = captures
        self._lock = threading.Lock()

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Runs the plan; see `diffuserve.stages.Engine`. A call of more rows than a profile allows is made in pieces.

        Raises:
            ValueError: an input is missing, unknown or of another dtype.
            StageFailed: no profile allows the inputs' shapes, or TensorRT or CUDA failed.
        """
        check_dtypes(inputs, {name: self._dtypes[name] for name in self._inputs})
        shapes = {name: array.shape for name, array in inputs.items()}
        if len({shape[:1] for shape in shapes.values()}) != 1:
            raise ValueError(f"The inputs have different numbers of rows: {shapes}.")
        most = most_rows(self._profiles, shapes)
        with self._lock:
            return join_rows([self._run(piece) for piece in split_rows(inputs, most)])

    def _run(self, inputs: Arrays) -> Arrays:
        shapes = {name: array.shape for name, array in inputs.items()}
        number = profile_for(self._profiles, shapes)
        key = tuple(shapes[name] for name in self._inputs)
        graph = self._graphs.get(key)
        captures = self._captures and has_one_size(self._profiles[number]) and key[0][0] <= MOST_GRAPH_ROWS
        context = self._make_context(number) if captures and not graph else self._contexts[number]
        output_shapes = graph.output_shapes if graph else self._prepare(context, shapes)
        for name, array in inputs.items():
            self._memory[name].send(array)
        if graph:
            self._gpu.launch(graph.handle)
        else:
            self._execute(context)
        for name, shape in output_shapes.items():
            self._memory[name].fetch(self._size(name, shape))
        self._gpu.synchronize()
        outputs = {name: self._memory[name].array(shape, self._dtypes[name]) for name, shape in output_shapes.items()}
        if captures and not graph:
            self._capture(key, context, output_shapes)
        return outputs

    def _prepare(self, context: PlanContext, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Tells `context` the shapes and where everything is. Returns the outputs' shapes."""
        for name, shape in shapes.items():
            _accepted(context.set_input_shape(name, shape), f"the shape {shape} of {name}")
        output_shapes = {name: tuple(context.get_tensor_shape(name)) for name in self._outputs}
        if unknown := {name: shape for name, shape in output_shapes.items() if any(side < 0 for side in shape)}:
            raise StageFailed(
                f"TensorRT does not know the shapes of {unknown} for inputs of the shapes {dict(shapes)}."
            )
        needed = context.update_device_memory_size_for_shapes()
        sizes = {name: self._size(name, shape) for name, shape in {**shapes, **output_shapes}.items()}
        if needed > self._workspace.size_bytes or any(
            size > self._memory[name].on_gpu.size_bytes for name, size in sizes.items()
        ):
            self._drop_graphs()  # before anything moves, which may fail half-way
        self._workspace.reserve(needed)
        for name, size in sizes.items():
            self._memory[name].reserve(size)
            address = self._memory[name].on_gpu.address
            _accepted(context.set_tensor_address(name, address), f"the address of {name}")
        context.set_device_memory(self._workspace.address, self._workspace.size_bytes)
        return output_shapes

    def _execute(self, context: PlanContext) -> None:
        _accepted(context.execute_async_v3(self._gpu.stream), "the call")

    def _capture(self, key: tuple[Shape, ...], context: PlanContext, output_shapes: dict[str, Shape]) -> None:
        """A plan that cannot be captured goes on without graphs."""
        try:
            self._graphs[key] = _Graph(self._gpu.capture(lambda: self._execute(context)), context, output_shapes)
        except StageFailed as error:
            log.warning("going on without CUDA graphs: %s", error)
            self._captures = False

    def _drop_graphs(self) -> None:
        for graph in self._graphs.values():
            self._gpu.discard(graph.handle)
        self._graphs.clear()

    def _size(self, name: str, shape: Shape) -> int:
        return int(np.prod(shape)) * self._dtypes[name].itemsize


@dataclass(frozen=True)
class _Graph:
    handle: Any
    context: PlanContext  # kept, since the graph uses what is its
    output_shapes: dict[str, Shape]


class _GpuMemory:
    """A piece of the GPU's memory that grows."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self.address, self.size_bytes = 0, 0

    def reserve(self, size_bytes: int) -> None:
        """Its content is lost where it grows."""
        if size_bytes <= self.size_bytes:
            return
        if self.size_bytes:
            self.size_bytes = 0
            self._gpu.free(self.address)
        self.address = self._gpu.allocate(size_bytes)
        self.size_bytes = size_bytes


class _TensorMemory:
    """A tensor's, on the GPU and page-locked on the host."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self.on_gpu = _GpuMemory(gpu)
        self._host: Bytes = np.empty(0, np.uint8)

    def reserve(self, size_bytes: int) -> None:
        if size_bytes > len(self._host):
            if len(self._host):
                address, self._host = self._host.ctypes.data, np.empty(0, np.uint8)
                self._gpu.free(address)
            self._host = self._gpu.allocate_host(size_bytes)
        self.on_gpu.reserve(size_bytes)

    def send(self, array: NDArray[Any]) -> None:
        source = self._host[: array.nbytes]
        source.view(array.dtype).reshape(array.shape)[...] = array
        self._gpu.to_gpu(self.on_gpu.address, source)

    def fetch(self, size_bytes: int) -> None:
        self._gpu.to_host(self._host[:size_bytes], self.on_gpu.address)

    def array(self, shape: Shape, dtype: np.dtype[Any]) -> NDArray[Any]:
        """A copy of what was fetched, since the next call writes over it."""
        size_bytes = int(np.prod(shape)) * dtype.itemsize
        return self._host[:size_bytes].view(dtype).reshape(shape).copy()


def _accepted(accepted: bool, what: str) -> None:
    if not accepted:
        raise StageFailed(f"TensorRT refuses {what}; its own messages above say why.")
