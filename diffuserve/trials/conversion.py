"""An exported component as another engine runs it: files made of the exported ones, which stay."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec

from diffuserve.bundle.checksums import describe_file
from diffuserve.bundle.manifest import Component, File, ModelSpec
from diffuserve.engines import ENGINES
from diffuserve.engines.compiled_cache import compiled_beside, remove_compiled
from diffuserve.engines.tensorrt_builder import build_plan
from diffuserve.engines.tensorrt_library import LIBRARIES
from diffuserve.engines.tensorrt_profiles import plan_limits
from diffuserve.graphs.sixteen_bit import PRECISIONS, sixteen_bit_from_onnx
from diffuserve.limits import Limits

# In the name of a file that was made of the exported ones for an engine: model.fp16.onnx, model.fp32.32x1024x3.sm90.trt11.4.1.plan.
_MADE = re.compile(r"\.(fp16|bf16|fp32)\.")


def converted(
    bundle: Path,
    component: Component,
    engine: str,
    precision: str,
    model: ModelSpec,
    limits: Limits,
    architectures: Sequence[str] = (),
) -> Component:
    """The component as an engine runs it. On a GPU its graph is converted for 16 bits, and for TensorRT a plan is built of that,
    unless it has been. (OpenVINO converts fp32 graphs itself.)

    Args:
        bundle: its folder, where the files are made.
        component: on any engine.
        engine, precision: as `diffuserve engines` lists them.
        model: the bundle's.
        limits: of the servers that a plan is for.
        architectures: of the GPUs that a plan is for; if there are none, of the one that is here.

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
    if library := LIBRARIES.get(engine):
        plan = build_plan(library, graph, precision, component.tensors, model, limits, architectures)
        made = [plan, *made]
        built_for = plan_limits(limits)
    files = (*(describe_file(bundle, path) for path in made), *exported)
    return msgspec.structs.replace(component, engine=engine, precision=precision, files=files, plan_limits=built_for)


def exported_files(component: Component) -> tuple[File, ...]:
    """Its files without those that were made of them for an engine."""
    return tuple(file for file in component.files if not is_made(file.path))


def is_made(name: str) -> bool:
    """Whether a file of that name was made for an engine."""
    return _MADE.search(name) is not None


def remove_what_is_not_used(bundle: Path, component: Component) -> None:
    """Removes what trials of other engines have left beside the component's files."""
    path = bundle / component.files[0].path
    compiled = compiled_beside(path, component)
    for engine in ENGINES:
        if engine != component.engine:
            remove_compiled(path, msgspec.structs.replace(component, files=exported_files(component)), engine)
        # What was compiled of files that are made, and not of the exported ones.
        for entry in path.parent.glob(f"*.{engine}"):
            if entry not in compiled:
                shutil.rmtree(entry)
    used = {bundle / file.path for file in component.files}
    for file in path.parent.iterdir():
        if is_made(file.name) and file not in used:
            file.unlink()
