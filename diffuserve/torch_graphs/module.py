"""An ONNX graph as a PyTorch module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffuserve.errors import BundleError
from diffuserve.graphs.graph_index import attributes
from diffuserve.torch_graphs.operators import OPERATORS, Operator
from diffuserve.torch_graphs.weights import tensor_of

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

# Before it reductions had their axes as an attribute, and Split had no number of outputs.
_LEAST_OPSET = 18


class OnnxModule(torch.nn.Module):
    """Runs a graph's nodes one after another, each by its operator, and forgets a value when nobody needs it any more.

    It computes in the graph's types. Weights are buffers, named `weight_N`; convolutions' have their channels last.

    Args:
        model: weights may lie in another file.
        folder: where that is.
        device: where it runs.

    Raises:
        BundleError: the graph is too old, an operator is none that `diffuserve.torch_graphs.operators` has, or weights or
            other values are missing.
    """

    def __init__(self, model: ModelProto, folder: Path, device: torch.device) -> None:
        super().__init__()
        graph = model.graph
        _check_opset(model)
        self.input_names = [value.name for value in graph.input]
        self.output_names = [value.name for value in graph.output]
        self._known: dict[str, Any] = {}  # constants that are sizes or numbers of an operator
        self._weights: dict[str, str] = {}  # the buffer of each other constant
        self._nodes = [_Node(node, device) for node in graph.node if node.op_type != "Constant"]
        self._forget_after(graph)
        for name, tensor in _constants(graph, folder, {name for node in self._nodes for name in node.inputs}):
            self._keep(name, tensor, device)
        self._check_values()

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Args:
            inputs: in the order of `input_names`.

        Returns:
            The outputs in the order of `output_names`.
        """
        values: dict[str, Any] = dict(zip(self.input_names, inputs, strict=True))
        values |= self._known | {name: getattr(self, buffer) for name, buffer in self._weights.items()}
        values[""] = None
        for node in self._nodes:
            made = node.run(node.attributes, *[values[name] for name in node.inputs])
            values |= zip(node.outputs, made if len(node.outputs) > 1 else (made,), strict=True)
            for name in node.forgets:
                del values[name]
        return tuple(values[name] for name in self.output_names)

    def _keep(self, name: str, tensor: torch.Tensor, device: torch.device) -> None:
        consumers = {node.name for node in self._nodes if name in node.inputs}
        if consumers == {"Resize"} or (tensor.dtype == torch.int64 and tensor.dim() < 2):
            self._known[name] = tensor.tolist()
        else:
            if tensor.dim() == 4 and "Conv" in consumers:
                tensor = tensor.to(device).contiguous(memory_format=torch.channels_last)
            self._weights[name] = f"weight_{len(self._weights)}"
            self.register_buffer(self._weights[name], tensor.to(device))

    def _check_values(self) -> None:
        """That every value is there when a node takes it, and that every output is made."""
        there = {*self.input_names, *self._known, *self._weights, ""}
        for node in self._nodes:
            _check_are_there(node.inputs, there, f"{node.name} takes")
            there |= {*node.outputs}
        _check_are_there(self.output_names, there, "it returns")

    def _forget_after(self, graph: GraphProto) -> None:
        """Tells every node which values it is the last to need."""
        needed = {value.name for value in graph.output} | {tensor.name for tensor in graph.initializer}
        for node in reversed(self._nodes):
            node.forgets = tuple({*node.inputs, *node.outputs} - needed - {""})
            needed |= {*node.inputs}


def _check_are_there(names: Iterable[str], there: set[str], who: str) -> None:
    if missing := [name for name in names if name not in there]:
        raise BundleError(
            f"The graph is damaged: {who} {', '.join(missing)}, which nothing makes. Export the checkpoint again."
        )


class _Node:
    def __init__(self, node: NodeProto, device: torch.device) -> None:
        self.name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        self.inputs, self.outputs = tuple(node.input), tuple(node.output)
        self.attributes: Mapping[str, Any] = {**attributes(node), "device": device}
        self.forgets: tuple[str, ...] = ()
        self.run: Operator = _operator(self.name)


def _check_opset(model: ModelProto) -> None:
    opset = max((each.version for each in model.opset_import if not each.domain), default=1)
    if opset < _LEAST_OPSET:
        raise BundleError(
            f"The graph is of ONNX's opset {opset}, and the engine torch runs those from {_LEAST_OPSET} on. Export the checkpoint "
            "again."
        )


def _operator(name: str) -> Operator:
    try:
        return OPERATORS[name]
    except KeyError:
        raise BundleError(
            f"The graph has the operator {name}, which the engine torch does not know. Choose another engine: "
            "diffuserve engines BUNDLE --select auto"
        ) from None


def _constants(graph: GraphProto, folder: Path, used: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values, those of nodes included."""
    for tensor in graph.initializer:
        if tensor.name in used:
            yield tensor.name, tensor_of(tensor, folder)
    for node in graph.node:
        if node.op_type == "Constant":
            ((kind, value),) = attributes(node).items()
            yield node.output[0], tensor_of(value, folder) if kind == "value" else _tensor(kind, value)


def _tensor(kind: str, value: Any) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int64 if kind.startswith("value_int") else torch.float32)
