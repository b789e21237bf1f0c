"""What the TensorRT engine asks of CUDA: memory, one stream, and graphs. Of this file nothing has run, since no NVIDIA GPU
was at hand; its calls exist in NVIDIA's bindings with these arguments."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from diffuserve.errors import StageFailed

Bytes = NDArray[np.uint8]


class Gpu(Protocol):
    """One stream of a GPU, and memory for what runs in it. What is asked for first is done first; every method raises
    StageFailed if CUDA refuses."""

    stream: int

    def allocate(self, size_bytes: int) -> int:
        """The address of memory on the GPU."""
        ...

    def allocate_host(self, size_bytes: int) -> Bytes:
        """Memory of the host that the GPU copies from and to without a detour, page-locked: (size_bytes,)."""
        ...

    def free(self, address: int) -> None:
        """Gives back what `allocate` gave, or the address of what `allocate_host` gave."""
        ...

    def to_gpu(self, address: int, source: Bytes) -> None:
        """Copies `source` to the GPU; it must stay as it is until `synchronize` returns."""
        ...

    def to_host(self, target: Bytes, address: int) -> None:
        """Fills `target` from the GPU; it is full when `synchronize` has returned."""
        ...

    def synchronize(self) -> None:
        """Waits for all that has been asked for."""
        ...

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """A graph of what `enqueue` asks of the stream, which is not done now."""
        ...

    def launch(self, graph: Any) -> None:
        """Asks for all of a graph at once."""
        ...

    def discard(self, graph: Any) -> None: ...


class FirstGpu:
    """Implements `Gpu` through cuda-python; all memory and graphs are given back with it.

    Raises:
        ImportError: cuda-python is not installed.
        StageFailed: CUDA cannot be used.
    """

    def __init__(self) -> None:
        from cuda.bindings import runtime

        self._cuda = runtime
        # Not waiting for the default stream, in which other libraries of this process may work.
        stream = self._checked(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))
        self.stream = int(stream)
        # What gives back each piece of memory and each graph.
        self._owned: dict[int, Callable[[], Any]] = {}
        # At the end of the process the driver does it.
        weakref.finalize(self, _give_back, runtime, stream, self._owned).atexit = False

    def allocate(self, size_bytes: int) -> int:
        address = int(self._checked(self._cuda.cudaMalloc(size_bytes)))
        self._owned[address] = partial(self._cuda.cudaFree, address)
        return address

    def allocate_host(self, size_bytes: int) -> Bytes:
        address = int(self._checked(self._cuda.cudaMallocHost(size_bytes)))
        self._owned[address] = partial(self._cuda.cudaFreeHost, address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address))

    def free(self, address: int) -> None:
        self._checked(self._owned.pop(address)())

    def to_gpu(self, address: int, source: Bytes) -> None:
        self._copy(address, source.ctypes.data, source.nbytes, self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def to_host(self, target: Bytes, address: int) -> None:
        self._copy(target.ctypes.data, address, target.nbytes, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost)

    def synchronize(self) -> None:
        self._checked(self._cuda.cudaStreamSynchronize(self.stream))

    def capture(self, enqueue: Callable[[], None]) -> Any:
        cuda = self._cuda
        # Other threads may allocate meanwhile: only this one must not.
        self._checked(
            cuda.cudaStreamBeginCapture(self.stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        )
        try:
            enqueue()
        except BaseException:
            cuda.cudaStreamEndCapture(self.stream)  # fails too, and the stream can be used again
            cuda.cudaGetLastError()  # forgets the failure, which the next call would report
            raise
        captured = self._checked(cuda.cudaStreamEndCapture(self.stream))
        try:
            graph = self._checked(cuda.cudaGraphInstantiate(captured, 0))
        finally:
            cuda.cudaGraphDestroy(captured)
        self._owned[int(graph)] = partial(cuda.cudaGraphExecDestroy, graph)
        return graph

    def launch(self, graph: Any) -> None:
        self._checked(self._cuda.cudaGraphLaunch(graph, self.stream))

    def discard(self, graph: Any) -> None:
        self._checked(self._owned.pop(int(graph))())

    def _copy(self, target: int, source: int, size_bytes: int, kind: Any) -> None:
        self._checked(self._cuda.cudaMemcpyAsync(target, source, size_bytes, kind, self.stream))

    def _checked(self, result: tuple[Any, ...]) -> Any:
        """The value of a CUDA call, which returns an error code before it."""
        error, *values = result
        if error != self._cuda.cudaError_t.cudaSuccess:
            raise StageFailed(f"CUDA failed: {error!s}")
        return values[0] if values else None


def _give_back(cuda: Any, stream: Any, owned: dict[int, Callable[[], Any]]) -> None:
    """Not checked: nobody is left to be told."""
    cuda.cudaStreamSynchronize(stream)
    for give_back in owned.values():
        give_back()
    cuda.cudaStreamDestroy(stream)
