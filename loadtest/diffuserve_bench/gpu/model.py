"""The model whose speed is measured: a bundle in the work folder that has weights, if need be random ones."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import msgspec

from diffuserve.bundle.checksums import describe_file
from diffuserve.bundle.manifest import MANIFEST_NAME, Component, Manifest, read_manifest, write_manifest
from diffuserve.engines.example_inputs import example_inputs
from diffuserve.tensors import UNET
from diffuserve_bench.arithmetic import flops_of_onnx
from diffuserve_bench.gpu.record import PhaseRecord, Skipped
from diffuserve_bench.gpu.settings import Settings
from diffuserve_bench.gpu.ways import on_way, ways
from diffuserve_bench.gpu.weights import fill

_STORED_GRAPHS = "*.onnxruntime"


def model_in(settings: Settings) -> tuple[Path, Manifest]:
    """The bundle to measure, made at the first call; its components are on ONNX Runtime in fp32.

    Raises:
        Skipped: no model was named.
        BundleError: it is not a bundle.
    """
    if settings.model is None:
        raise Skipped("no model was named: --model FOLDER, made by diffuserve export --without-weights, or any bundle")
    bundle = settings.work / "model" / settings.model.resolve().name
    if not (bundle / MANIFEST_NAME).is_file():
        copy_bundle(settings.model, bundle)
    return bundle, read_manifest(bundle)


def copy_bundle(source: Path, target: Path) -> None:
    """Copies a bundle, whole or not at all, gives it random weights where it has none, and puts every component back on ONNX
    Runtime in fp32."""
    manifest = read_manifest(source)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(source, partial, ignore=shutil.ignore_patterns(_STORED_GRAPHS))
        components = {name: _filled(partial, name, each) for name, each in manifest.components.items()}
        write_manifest(partial, msgspec.structs.replace(manifest, components=components))
        shutil.rmtree(target, ignore_errors=True)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _filled(bundle: Path, stage: str, component: Component) -> Component:
    graph = bundle / stage / "model.onnx"
    fill(graph)
    data = graph.with_name(f"{graph.name}.data")
    files = tuple(describe_file(bundle, path) for path in (graph, data) if path.exists())
    return msgspec.structs.replace(component, engine="onnxruntime", precision="fp32", files=files)


def measure(settings: Settings, record: PhaseRecord) -> None:
    """What it takes to make the model ready, and how much a row of its UNet computes."""
    started_s = time.perf_counter()
    bundle, manifest = model_in(settings)
    model = manifest.model
    record.figure("make the model", time.perf_counter() - started_s, "s", model=model.name)
    size = sum(file.size_bytes for file in manifest.components[UNET].files)
    record.figure("UNet", size / 1e9, "GB in fp32", model=model.name)
    with record.part(figure="TFLOP/row"):
        inputs = example_inputs(manifest.components[UNET].tensors, model, 1)
        flops = flops_of_onnx(bundle / UNET / "model.onnx", inputs)
        record.figure("UNet", flops / 1e12, "TFLOP/row", model=model.name, size=f"{model.width}x{model.height}")
    for way in ways(settings):
        with record.part(stage=UNET, **way.settings):
            started_s = time.perf_counter()
            on_way(bundle, manifest, UNET, way)
            record.figure("convert the UNet", time.perf_counter() - started_s, "s", **way.settings)
