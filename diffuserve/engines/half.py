"""An fp32 ONNX graph in half precision, strongly typed: each value's type is written in the graph, none is left to the
engine's judgement, as TensorRT 11 demands and ONNX Runtime on a GPU profits from.

Inputs and outputs keep their types. What loses too much in 16 bits stays in fp32:
- what sines and cosines are taken of: a timestep near 1000 is known to half a unit in fp16, which is a wrong angle;
- normalisations, whose sums overflow;
- what becomes an image, from the last convolution on: 8 bits of brightness are rounded at the very end.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffuserve.errors import BundleError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

_FP32_OPS = frozenset({"GroupNormalization", "InstanceNormalization", "LayerNormalization", "Range"})
_TRIGONOMETRIC = frozenset({"Sin", "Cos"})
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# Inputs that ONNX allows in float only, by position.
_FLOAT_INPUTS = {"Resize": (2,)}
# Protobuf's limit is 2 GB, and ONNX stores larger graphs' weights beside them.
_EXTERNAL_FROM_BYTES = 1 << 30


def half_from_onnx(source: Path, target: Path) -> None:
    """Writes `target`, the graph of `source` in fp16; weights of large models go beside it, to `target`.data.

    Raises:
        BundleError: the graph has functions or branches, or values whose type it does not tell.
    """
    import onnx

    model = onnx.load(source)
    _convert(model)
    size_bytes = model.ByteSize()
    data_name = f"{target.name}.data"
    (target.parent / data_name).unlink(missing_ok=True)  # onnx would append to it
    # Renamed when it has been checked: a graph that is there is taken for whole. The data has its own name in the graph.
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        onnx.save(model, aside, save_as_external_data=size_bytes > _EXTERNAL_FROM_BYTES, location=data_name)
        # Infers every type again and compares it with what each operator takes.
        onnx.checker.check_model(aside, full_check=True)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def _convert(model: ModelProto) -> None:
    from onnx import AttributeProto, TensorProto

    graph = model.graph
    if model.functions or any(
        attribute.type == AttributeProto.GRAPH for node in graph.node for attribute in node.attribute
    ):
        raise BundleError(f"The graph {graph.name} has functions or branches, which cannot be converted to fp16.")
    _constants_to_initializers(graph)
    _cast_bytes_first(graph)
    floats = _float_values(model)
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {output.name for output in graph.output}
    in_fp32 = _fp32_nodes(graph)
    halves: dict[str, str] = {}  # the name of a value's half, by the value's own
    singles: dict[str, str] = {}  # and the other way round, for values that are computed in half
    nodes: list[NodeProto] = []

    def cast(name: str, to: int, suffix: str) -> str:
        nodes.append(_node("Cast", [name], [f"{name}.{suffix}"], to=to))
        return f"{name}.{suffix}"

    def as_half(name: str) -> str:
        if name not in halves:
            if name in initializers:
                halves[name] = f"{name}.half"
                graph.initializer.append(_half_tensor(initializers[name], halves[name]))
            else:
                halves[name] = cast(name, TensorProto.FLOAT16, "half")
        return halves[name]

    def as_single(name: str) -> str:
        if name in singles and not singles[name]:
            singles[name] = cast(halves[name], TensorProto.FLOAT, "single")
        return singles.get(name, name)

    for number, node in enumerate(graph.node):
        half = number not in in_fp32
        fixed = _FLOAT_INPUTS.get(node.op_type, ())
        for at, name in enumerate(node.input):
            if name in floats:
                # A cast takes either type, so the one that is there.
                wants_half = half and at not in fixed and (node.op_type != "Cast" or name in singles)
                node.input[at] = as_half(name) if wants_half else as_single(name)
        nodes.append(node)
        if not half:
            continue
        _set_type(node)
        for at, name in enumerate(node.output):
            if name in floats:
                halves[name], singles[name] = f"{name}.half", ""
                node.output[at] = halves[name]
                if name in outputs:
                    nodes.append(_node("Cast", [halves[name]], [name], to=TensorProto.FLOAT))
                    singles[name] = name
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]  # the types in it are the old ones
    used = {name for node in nodes for name in node.input}
    for at in reversed(range(len(graph.initializer))):
        if graph.initializer[at].name not in used:
            del graph.initializer[at]


def _node(operator: str, inputs: list[str], outputs: list[str], **attributes: Any) -> NodeProto:
    from onnx import helper

    return helper.make_node(operator, inputs, outputs, name=f"{outputs[0]}.{operator}", **attributes)


def _constants_to_initializers(graph: GraphProto) -> None:
    """So that constants are converted as weights are."""
    from onnx import numpy_helper

    for at in reversed(range(len(graph.node))):
        node = graph.node[at]
        if node.op_type != "Constant":
            continue
        (attribute,) = node.attribute
        if attribute.name == "value":
            tensor = attribute.t
        elif attribute.name in ("value_float", "value_floats"):
            numbers = attribute.f if attribute.name == "value_float" else list(attribute.floats)
            tensor = numpy_helper.from_array(np.array(numbers, np.float32))
        else:
            continue
        added = graph.initializer.add()
        added.CopyFrom(tensor)
        added.name = node.output[0]
        del graph.node[at]


def _cast_bytes_first(graph: GraphProto) -> None:
    """Casts images before they are laid out otherwise: all that TensorRT does with bytes is to cast them."""
    inputs = {value.name for value in graph.input}
    producer = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        before = producer.get(node.input[0]) if node.op_type == "Cast" else None
        if before is not None and before.op_type == "Transpose" and before.input[0] in inputs:
            # The two nodes keep their places and names, and change what they do.
            before.op_type, node.op_type = node.op_type, before.op_type
            attributes = [list(each.attribute) for each in (node, before)]
            for each, others in zip((before, node), attributes, strict=True):
                del each.attribute[:]
                each.attribute.extend(others)


def _float_values(model: ModelProto) -> set[str]:
    """The names of all values in fp32."""
    from onnx import TensorProto, helper, shape_inference

    graph = model.graph
    # Without the weights' data, since more than 2 GB cannot be handed over.
    weights = [helper.make_tensor_value_info(each.name, each.data_type, list(each.dims)) for each in graph.initializer]
    skeleton = helper.make_model(
        helper.make_graph(
            graph.node, graph.name, [*graph.input, *weights], list(graph.output), value_info=list(graph.value_info)
        ),
        opset_imports=model.opset_import,
    )
    typed = shape_inference.infer_shapes(skeleton).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*typed.input, *typed.output, *typed.value_info)}
    if unknown := sorted({name for node in graph.node for name in node.output if name} - types.keys()):
        raise BundleError(f"The graph {graph.name} does not tell the types of {', '.join(unknown[:3])} ...")
    return {name for name, kind in types.items() if kind == TensorProto.FLOAT}


def _fp32_nodes(graph: GraphProto) -> set[int]:
    """The numbers of the nodes that stay as they are."""
    from onnx import TensorProto

    producer = {name: number for number, node in enumerate(graph.node) for name in node.output}

    def upstream(numbers: Iterable[int], stop_at: frozenset[str] = frozenset()) -> set[int]:
        found: set[int] = set()
        waiting = list(numbers)
        while waiting:
            number = waiting.pop()
            if number in found or graph.node[number].op_type in stop_at:
                continue
            found.add(number)
            waiting += [producer[name] for name in graph.node[number].input if name in producer]
        return found

    numbered = list(enumerate(graph.node))
    to_image = [number for number, node in numbered if _cast_type(node) == TensorProto.UINT8]
    return (
        {number for number, node in numbered if node.op_type in _FP32_OPS}
        | upstream(number for number, node in numbered if node.op_type in _TRIGONOMETRIC)
        | upstream(to_image, stop_at=_WEIGHTED)
    )


def _cast_type(node: NodeProto) -> int | None:
    """The type that a cast makes, None for other nodes."""
    if node.op_type != "Cast":
        return None
    return int(next(attribute.i for attribute in node.attribute if attribute.name == "to"))


def _set_type(node: NodeProto) -> None:
    """Writes fp16 where a node itself says what type it makes."""
    from onnx import TensorProto

    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16
        elif node.op_type == "ConstantOfShape" and attribute.t.data_type == TensorProto.FLOAT:
            attribute.t.CopyFrom(_half_tensor(attribute.t, attribute.t.name))


def _half_tensor(tensor: TensorProto, name: str) -> TensorProto:
    """Masks hold the lowest fp32, which fp16 has not: the lowest fp16 takes its place."""
    from onnx import numpy_helper

    limit = float(np.finfo(np.float16).max)
    return numpy_helper.from_array(numpy_helper.to_array(tensor).clip(-limit, limit).astype(np.float16), name)
