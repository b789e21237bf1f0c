"""Every stage's graph, as a TensorRT plan is built of it, against what TensorRT publishes that it takes: operators, types,
shapes. TensorRT itself needs a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, defs

from diffuserve.bundle.manifest import read_manifest
from diffuserve.graphs.sixteen_bit import PRECISIONS, sixteen_bit_from_onnx
from diffuserve.tensors import STAGES
from tests.core.tiny_graphs import make_real_bundle
from tests.export.tensorrt_operators import CONSTANT_INPUTS, RESIZE, TYPES
from tests.families import Family
from tests.graphs import check_profiles, value_types

_NAMES = {
    TensorProto.FLOAT: "FP32",
    TensorProto.FLOAT16: "FP16",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.DOUBLE: "FP64",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.UINT8: "UINT8",
    TensorProto.BOOL: "BOOL",
}
_NORMALISATIONS = ("GroupNormalization", "InstanceNormalization", "LayerNormalization")
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")

all_stages = pytest.mark.parametrize("stage", STAGES)
all_precisions = pytest.mark.parametrize("precision", (*PRECISIONS, "fp32"))


@all_stages
@all_precisions
def test_the_bundled_model(bundle: Path, tmp_path: Path, stage: str, precision: str) -> None:
    check(bundle, tmp_path, stage, precision)


@all_stages
@all_precisions
def test_small_graphs(tmp_path: Path, stage: str, precision: str) -> None:
    make_real_bundle(tmp_path / "bundle")
    check(tmp_path / "bundle", tmp_path, stage, precision)


@all_stages
@all_precisions
def test_each_family(family: Family, tmp_path: Path, stage: str, precision: str) -> None:
    check(family.bundle, tmp_path, stage, precision)


def check(bundle: Path, folder: Path, stage: str, precision: str) -> None:
    """Converts one stage of a bundle and looks at all of it."""
    manifest = read_manifest(bundle)
    path = bundle / stage / "model.onnx"
    if precision in PRECISIONS:
        sixteen_bit_from_onnx(path, folder / "model.onnx", precision)
        path = folder / "model.onnx"
    model = onnx.load(path)
    types = {name: _NAMES[kind] for name, kind in value_types(model).items()}
    check_operators(model, types)
    check_integers(model, types)
    if precision in PRECISIONS:
        check_precision(model, types)
    check_profiles(path, manifest.components[stage].tensors, manifest.model)


def data(node: onnx.NodeProto, opset: int) -> Iterable[str]:
    """The names of inputs and outputs that may be numbers of any kind: not indices, shapes, axes and conditions."""
    schema = defs.get_schema(node.op_type, opset)
    allowed = {each.type_param_str: each.allowed_type_strs for each in schema.type_constraints}
    for names, formals in ((node.input, schema.inputs), (node.output, schema.outputs)):
        for at, name in enumerate(names):
            formal = formals[min(at, len(formals) - 1)]
            if name and "tensor(float)" in allowed.get(formal.type_str, ()):
                yield name


def check_operators(model: onnx.ModelProto, types: dict[str, str]) -> None:
    """Every operator is one that TensorRT has, in the types that it is used in, and within the restrictions."""
    (opset,) = model.opset_import
    assert opset.domain == ""
    assert 9 <= opset.version <= 24
    known = {tensor.name for tensor in model.graph.initializer}
    known |= {name for node in model.graph.node if node.op_type == "Constant" for name in node.output}
    for node in model.graph.node:
        assert node.op_type in TYPES, f"TensorRT has no {node.op_type}"
        used = {types[name] for name in data(node, opset.version)}
        assert used <= TYPES[node.op_type], f"TensorRT has no {node.op_type} of {used - TYPES[node.op_type]}"
        if (at := CONSTANT_INPUTS.get(node.op_type)) is not None:
            assert set(node.input[at:]) <= known
        if node.op_type == "LayerNormalization":
            assert len(node.output) == 1
        if node.op_type == "Resize":
            for attribute in node.attribute:
                if attribute.name in RESIZE:
                    assert attribute.s.decode() in RESIZE[attribute.name]
                assert attribute.name != "antialias" or attribute.i == 0


def check_integers(model: onnx.ModelProto, types: dict[str, str]) -> None:
    """No fp64 at all, and int64 for shapes and indices only: none comes in or goes out, and none is made a number of."""
    (opset,) = model.opset_import
    assert "FP64" not in types.values()
    for value in (*model.graph.input, *model.graph.output):
        assert types[value.name] != "INT64"
    for node in model.graph.node:
        used = {types[name] for name in data(node, opset.version)}
        if "INT64" in used and node.op_type not in ("Shape", "Where", "ArgMax"):
            assert used <= {"INT64", "INT32", "BOOL"}, f"{node.op_type} {node.name} takes int64 and makes {used}"


def check_precision(model: onnx.ModelProto, types: dict[str, str]) -> None:
    """fp32 is where it is kept on purpose, and nowhere else."""
    graph = model.graph
    producer = {name: node for node in graph.node for name in node.output}
    weights = {tensor.name: int(np.prod(tensor.dims)) for tensor in graph.initializer}

    def before(names: Iterable[str], stop_at: tuple[str, ...]) -> set[str]:
        """All values that the named ones are computed of, with themselves."""
        found: set[str] = set()
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            node = producer.get(name)
            if name not in found and not (node and node.op_type in stop_at):
                found.add(name)
                waiting += node.input if node else []
        return found

    angles = before((name for node in graph.node if node.op_type in ("Sin", "Cos") for name in node.input), ())
    images = before((value.name for value in graph.output if types[value.name] in ("UINT8", "BOOL")), _WEIGHTED)
    for node in graph.node:
        in_fp32 = [name for name in (*node.input, *node.output) if name and types[name] == "FP32"]
        if not in_fp32 or node.op_type in ("Cast", *_NORMALISATIONS):
            continue
        if node.op_type == "Resize":
            assert in_fp32 == [node.input[2]]  # the scales
        elif node.op_type in ("Sin", "Cos"):
            assert set(in_fp32) <= {*node.input, *node.output}
        else:
            assert set(node.output) <= angles | images, f"{node.op_type} {node.name} is in fp32"
        if node.op_type in _WEIGHTED:
            assert sum(weights.get(name, 0) for name in in_fp32) < 1000
