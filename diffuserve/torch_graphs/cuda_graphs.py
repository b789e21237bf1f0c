"""Calls recorded as CUDA graphs: a GPU gets all the kernels of a call at once, which starting them one by one takes longer
than few rows keep it busy. What that gains has not been measured."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from diffuserve.torch_graphs.packages import Call

log = logging.getLogger(__name__)

# Larger calls keep a GPU busy for longer than starting their kernels takes.
MOST_ROWS = 8
# Shapes that have a graph; the one that was used the longest ago goes first.
_MOST_GRAPHS = 16
# Nobody else in this process may wait for the whole device meanwhile.
_CAPTURING = threading.Lock()

Tensors = Sequence[torch.Tensor]
# Runs a function, and returns what runs it again on the same memory.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


class GraphedCalls:
    """Calls of few rows become graphs the second time that there is one of the same shapes. Calls come one at a time.

    Args:
        call: runs on the device and waits for nothing.
        capture: by default `captured`.
    """

    def __init__(self, call: Call, capture: Capture | None = None) -> None:
        self._call = call
        self._capture = capture or _Captures()
        self._graphs: dict[tuple[torch.Size, ...], _Graph | None] = {}  # None after the first call
        self._captures = True

    def __call__(self, inputs: Tensors) -> Tensors:
        """Inputs and outputs are of the caller: a graph has its own."""
        if len(inputs[0]) > MOST_ROWS or not self._captures:
            return self._call(inputs)
        key = tuple(tensor.shape for tensor in inputs)
        is_new, graph = key not in self._graphs, self._graphs.pop(key, None)
        if is_new:
            outputs = self._call(inputs)
        else:
            try:
                graph = graph or _Graph(self._call, inputs, self._capture)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                log.warning("going on without CUDA graphs: %s", error)
                self._captures = False
                self._graphs.clear()
                return self._call(inputs)
            outputs = graph(inputs)
        self._graphs[key] = graph
        while len(self._graphs) > _MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        return outputs


class _Graph:
    """A call on inputs of fixed shapes, which are copied to where it reads them."""

    def __init__(self, call: Call, example: Tensors, capture: Capture) -> None:
        self._inputs = [tensor.clone() for tensor in example]
        self._outputs: Tensors = ()

        def run() -> None:
            self._outputs = call(self._inputs)

        call(self._inputs)  # libraries prepare themselves for each thread, which a capture does not allow
        self._replay = capture(run)

    def __call__(self, inputs: Tensors) -> Tensors:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._replay()
        return [tensor.clone() for tensor in self._outputs]


class _Captures:
    """Captures on the current device. All graphs of one instance share the memory that they use in between, since they never
    run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Any]) -> Callable[[], None]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads may use the GPU meanwhile.
            with _CAPTURING, torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                function()
        finally:
            # A capture that fails leaves PyTorch on its stream, where nothing waits for what others give to this one.
            torch.cuda.set_stream(stream)
        replay: Callable[[], None] = graph.replay
        return replay
