"""Types and shapes of the values of ONNX graphs, and graphs in 16 bits on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from diffuserve.bundle.manifest import ModelSpec
from diffuserve.engines.tensorrt_profiles import profiles
from diffuserve.limits import Limits
from diffuserve.tensors import StageSpec


def value_types(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every value by name, weights too."""
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def output_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The outputs' shapes for inputs of `shapes`, 0 where it is not known."""
    model = onnx.load(path)
    for value in model.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
            assert dim.dim_value in (0, size), f"{value.name} is {dim.dim_value} long in the graph, and is to be {size}"
            dim.dim_value = size
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    return [tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in graph.output]


def check_profiles(path: Path, tensors: StageSpec, model: ModelSpec) -> None:
    """Asserts that the graph makes outputs of known shapes of every shape that a TensorRT plan of it is built for."""
    for profile in profiles(tensors, model, Limits.for_model(model)):
        for selector in ("min", "opt", "max"):
            shapes = {name: getattr(ranges, selector) for name, ranges in profile.items()}
            (batch,) = {shape[0] for shape in shapes.values()}
            for found, spec in zip(output_shapes(path, shapes), tensors.outputs, strict=True):
                assert found[0] == batch
                assert all(found)
                assert all(size == dim for size, dim in zip(found[1:], spec.dims, strict=True) if isinstance(dim, int))


_NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def run_rounded(path: Path, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """Runs a graph in fp16 or bf16 on the CPU, for which ONNX Runtime has casts of bf16 and nothing else: each operator is
    computed in fp32, and what it makes is rounded, as hardware that sums in fp32 does it."""
    import onnxruntime

    model = onnx.load(path)
    types = value_types(model)
    nodes: list[onnx.NodeProto] = []
    for number, node in enumerate(model.graph.node):
        if node.op_type == "Cast":
            nodes.append(node)
            continue
        for at, name in enumerate(node.input):
            if types.get(name) in _NARROW:
                node.input[at] = f"{name}.for.{number}"
                nodes.append(helper.make_node("Cast", [name], [node.input[at]], to=TensorProto.FLOAT))
        nodes.append(node)
        for at, name in enumerate(node.output):
            if types.get(name) in _NARROW:
                node.output[at] = f"{name}.exact"
                nodes.append(helper.make_node("Cast", [node.output[at]], [name], to=types[name]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    options = onnxruntime.SessionOptions()
    # Optimising, it would drop the casts there and back.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs: list[NDArray[Any]] = session.run(None, dict(inputs))
    return outputs


def rounded_to_bf16(numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """By PyTorch."""
    import torch

    rounded: NDArray[np.float32] = torch.from_numpy(numbers).to(torch.bfloat16).float().numpy()
    return rounded
