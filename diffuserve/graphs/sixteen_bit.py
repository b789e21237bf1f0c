"""An fp32 ONNX graph in fp16 or bf16, strongly typed: each value's type is written in the graph, none is left to the
engine's judgement, as TensorRT 11 demands and ONNX Runtime on a GPU profits from.

Inputs and outputs keep their types. What loses too much in 16 bits stays in fp32:
- what sines and cosines are taken of: a timestep near 1000 is known to half a unit in fp16, which is a wrong angle;
- normalisations, whose sums overflow fp16 and lose digits in bf16;
- what becomes an image, and what tells whether it is finite, from the last convolution on: 8 bits of brightness are
  rounded at the very end;
- what ONNX has in fp32 only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffuserve.errors import BundleError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

PRECISIONS = ("fp16", "bf16")
_FP32_OPS = frozenset({"GroupNormalization", "InstanceNormalization", "LayerNormalization"})
_TRIGONOMETRIC = frozenset({"Sin", "Cos"})
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# The first opset that has convolutions in bf16. Of the operators in our graphs it changes nothing but the types.
_BF16_OPSET = 22
# The largest finite numbers. Masks hold the lowest fp32, which would become infinite.
_LARGEST = {"fp16": float(np.finfo(np.float16).max), "bf16": 3.3895313892515355e38}
_ONNX_NAME = {"fp16": "float16", "bf16": "bfloat16"}
# Protobuf's limit is 2 GB, and ONNX stores larger graphs' weights beside them.
_EXTERNAL_FROM_BYTES = 1 << 30


def sixteen_bit_from_onnx(source: Path, target: Path, precision: str) -> None:
    """Writes `target`, the graph of `source` in `precision`, one of `PRECISIONS`; weights of large models go beside it, to
    `target`.data.

    Raises:
        BundleError: the graph has functions or branches, or values whose type it does not tell.
    """
    import onnx

    model = onnx.load(source)
    _convert(model, precision)
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


def _convert(model: ModelProto, precision: str) -> None:
    from onnx import AttributeProto, TensorProto

    graph, narrow_type = model.graph, _tensor_type(precision)
    if model.functions or any(
        attribute.type == AttributeProto.GRAPH for node in graph.node for attribute in node.attribute
    ):
        raise BundleError(
            f"The graph {graph.name} has functions or branches, which cannot be converted to {precision}."
        )
    if precision == "bf16":
        for opset in model.opset_import:
            opset.version = max(opset.version, _BF16_OPSET)
    _constants_to_initializers(graph)
    floats = _float_values(model)
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {output.name for output in graph.output}
    in_fp32 = _fp32_nodes(model, precision)
    narrows: dict[str, str] = {}  # the name of a value in 16 bits, by the value's own
    singles: dict[str, str] = {}  # and the other way round, for values that are computed in 16 bits
    nodes: list[NodeProto] = []

    def cast(name: str, to: int, suffix: str) -> str:
        nodes.append(_node("Cast", [name], [f"{name}.{suffix}"], to=to))
        return f"{name}.{suffix}"

    def as_narrow(name: str) -> str:
        if name not in narrows:
            if name in initializers:
                narrows[name] = f"{name}.{precision}"
                graph.initializer.append(_narrow_tensor(initializers[name], narrows[name], precision))
            else:
                narrows[name] = cast(name, narrow_type, precision)
        return narrows[name]

    def as_single(name: str) -> str:
        if name in singles and not singles[name]:
            singles[name] = cast(narrows[name], TensorProto.FLOAT, "fp32")
        return singles.get(name, name)

    for number, node in enumerate(graph.node):
        narrow = number not in in_fp32
        fixed = _fp32_inputs(node, model, precision)
        for at, name in enumerate(node.input):
            if name in floats:
                # A cast takes either type, so the one that is there.
                wants_narrow = narrow and at not in fixed and (node.op_type != "Cast" or name in singles)
                node.input[at] = as_narrow(name) if wants_narrow else as_single(name)
        nodes.append(node)
        if not narrow:
            continue
        _set_type(node, precision)
        for at, name in enumerate(node.output):
            if name in floats:
                narrows[name], singles[name] = f"{name}.{precision}", ""
                node.output[at] = narrows[name]
                if name in outputs:
                    nodes.append(_node("Cast", [narrows[name]], [name], to=TensorProto.FLOAT))
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


def _fp32_nodes(model: ModelProto, precision: str) -> set[int]:
    """The numbers of the nodes that stay as they are."""
    from onnx import TensorProto

    graph = model.graph
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
    no_floats = [
        producer[output.name]
        for output in graph.output
        if output.type.tensor_type.elem_type in (TensorProto.UINT8, TensorProto.BOOL)
    ]
    return (
        {number for number, node in numbered if node.op_type in _FP32_OPS or not _exists(node, model, precision)}
        | upstream(number for number, node in numbered if node.op_type in _TRIGONOMETRIC)
        | upstream(no_floats, stop_at=_WEIGHTED)
    )


def _exists(node: NodeProto, model: ModelProto, precision: str) -> bool:
    """Whether ONNX has the operator in `precision`."""
    return not any(_fp32_only(formal, node, model, precision) for formal in _schema(node, model).outputs)


def _fp32_inputs(node: NodeProto, model: ModelProto, precision: str) -> set[int]:
    """The positions of inputs that ONNX has in fp32 but not in `precision`, such as Resize's scales."""
    formals = _schema(node, model).inputs
    # The last one may stand for any number.
    return {
        at for at in range(len(node.input)) if _fp32_only(formals[min(at, len(formals) - 1)], node, model, precision)
    }


def _fp32_only(formal: Any, node: NodeProto, model: ModelProto, precision: str) -> bool:
    """`formal`: an input or output of the operator's schema."""
    constraints = {each.type_param_str: each.allowed_type_strs for each in _schema(node, model).type_constraints}
    types = constraints.get(formal.type_str, [formal.type_str])
    return "tensor(float)" in types and f"tensor({_ONNX_NAME[precision]})" not in types


def _schema(node: NodeProto, model: ModelProto) -> Any:
    from onnx import defs

    (opset,) = (each.version for each in model.opset_import if each.domain == node.domain)
    return defs.get_schema(node.op_type, opset, node.domain)


def _set_type(node: NodeProto, precision: str) -> None:
    """Writes the type where a node itself says what it makes."""
    from onnx import TensorProto

    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = _tensor_type(precision)
        elif node.op_type == "ConstantOfShape" and attribute.t.data_type == TensorProto.FLOAT:
            attribute.t.CopyFrom(_narrow_tensor(attribute.t, attribute.t.name, precision))


def _tensor_type(precision: str) -> int:
    from onnx import TensorProto

    return int({"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision])


def _narrow_tensor(tensor: TensorProto, name: str, precision: str) -> TensorProto:
    from onnx import TensorProto, numpy_helper

    limit = _LARGEST[precision]
    numbers = numpy_helper.to_array(tensor).ravel().clip(-limit, limit)
    bits = numbers.astype(np.float16).view(np.uint16) if precision == "fp16" else _bf16_bits(numbers)
    return TensorProto(
        data_type=_tensor_type(precision), dims=tensor.dims, name=name, raw_data=bits.astype("<u2").tobytes()
    )


def _bf16_bits(numbers: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper half of each finite number's bits, rounded to the nearest, half to even."""
    bits = numbers.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
