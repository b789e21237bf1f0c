"""An exported component as another engine runs it: files made of the exported ones, which stay."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from diffuserve.bundle.checksums import describe_file
from diffuserve.bundle.manifest import Component, File, ModelSpec
from diffuserve.engines.tensorrt_plan import build_plan
from diffuserve.engines.tensorrt_profiles import plan_limits
from diffuserve.graphs.sixteen_bit import PRECISIONS, sixteen_bit_from_onnx
from diffuserve.limits import Limits

# In the name of a file that was made of the exported ones for an engine: model.fp16.onnx, model.fp32.32x1024x3.sm90.trt11.4.1.plan.
_MADE = re.compile(r"\.(fp16|bf16|fp32)\.")


def converted(
    bundle: Path, component: Component, engine: str, precision: str, model: ModelSpec, limits: Limits
) -> Component:
    """The component as an engine runs it. On a GPU its graph is converted for 16 bits, and for TensorRT a plan is built of that,
    unless it has been. (OpenVINO converts fp32 graphs itself.)

    Args:
        bundle: its folder, where the files are made.
        component: on any engine.
        engine, precision: as `diffuserve engines` lists them.
        model: the bundle's.
        limits: of the servers that a plan is for.

    Raises:
        BundleError: the graph cannot be converted, or no plan can be built of it.
    """
    exported = exported_files(component)
    made: list[Path] = []
    built_for: dict[str, int] = {}
    graph = bundle / exported[0].path
    if precision in PRECISIONS and engine != "openvino":
        source, graph = graph, graph.with_suffix(f".{precision}.onnx")
        if not graph.is_file():
            sixteen_bit_from_onnx(source, graph, precision)
        made = sorted(graph.parent.glob(f"{graph.name}*"))
    if engine == "tensorrt":
        made = [build_plan(graph, precision, component.tensors, model, limits), *made]
        built_for = plan_limits(limits)
    files = (*(describe_file(bundle, path) for path in made), *exported)
    return msgspec.structs.replace(component, engine=engine, precision=precision, files=files, plan_limits=built_for)


def exported_files(component: Component) -> tuple[File, ...]:
    """Its files without those that were made of them for an engine."""
    return tuple(file for file in component.files if not is_made(file.path))


def is_made(name: str) -> bool:
    """Whether a file of that name was made for an engine."""
    return _MADE.search(name) is not None
