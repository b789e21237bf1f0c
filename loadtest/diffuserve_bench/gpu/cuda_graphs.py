"""A call recorded once as a CUDA graph and replayed: the GPU gets all its kernels at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from diffuserve_bench.torch_unet import Tensors

if TYPE_CHECKING:
    import torch

_WARM_CALLS = 3  # as PyTorch's own notes on CUDA graphs have it


class Graphed:
    """A call on inputs of fixed shapes.

    Args:
        call: makes one tensor of the inputs, on the GPU and without waiting for it.
        example: the first inputs.
    """

    def __init__(self, call: Callable[[Tensors], torch.Tensor], example: Tensors) -> None:
        import torch

        self._inputs = {name: tensor.clone() for name, tensor in example.items()}
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_CALLS):
                call(self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = call(self._inputs)

    def __call__(self, inputs: Tensors) -> torch.Tensor:
        """The output; it is overwritten by the next call."""
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor)
        self._graph.replay()
        return self._output
