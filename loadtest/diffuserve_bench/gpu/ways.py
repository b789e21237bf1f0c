"""The engines and precisions of a run, and a model's components on them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffuserve.bundle.manifest import Component, Manifest
from diffuserve.engines import load_engine
from diffuserve.engines.availability import availability
from diffuserve.engines.example_inputs import Arrays
from diffuserve.engines.onnxruntime import OnnxRuntimeEngine
from diffuserve.limits import Limits
from diffuserve.stages import Engine
from diffuserve.trials.conversion import converted
from diffuserve_bench.gpu.record import Skipped
from diffuserve_bench.gpu.settings import Settings

_ON_CPU = ("onnxruntime", "openvino", "torch")


@dataclass(frozen=True)
class Way:
    """`lack`: why it cannot run here; empty if it can."""

    engine: str
    precision: str
    lack: str = ""

    @property
    def settings(self) -> dict[str, str]:
        """Of its figures."""
        return {"engine": self.engine, "precision": self.precision}


def ways(settings: Settings) -> list[Way]:
    """Those that were asked for. Else every engine for GPUs in each of its 16-bit precisions, those that cannot run here too;
    in a dry run what a CPU runs in fp32."""
    if settings.device == "cpu":
        os.environ["TORCH_COMPILE_DISABLE"] = "1"  # it takes minutes, and a dry run only shows that everything runs
        if not settings.ways:
            return [*([Way("torch", "fp32")] if _has_torch() else []), Way("onnxruntime", "fp32")]
    known = [
        Way(each.engine, each.precision, "; ".join(f"{missing.reason}: {missing.fix}" for missing in each.missing))
        for each in availability()
    ]
    if settings.ways:
        found = {f"{way.engine}:{way.precision}": way for way in known}
        asked = [name.split(":") for name in settings.ways]
        lack = f"it is none of {', '.join(found)}"
        return [found.get(f"{engine}:{precision}") or Way(engine, precision, lack) for engine, precision in asked]
    return [way for way in known if way.engine not in _ON_CPU and way.precision != "fp32"]


def _has_torch() -> bool:
    try:
        import torch  # noqa: F401 - asked whether it is there
    except ImportError:
        return False
    return True


def on_way(bundle: Path, manifest: Manifest, stage: str, way: Way) -> Component:
    """The component as it runs on `way`; what that takes is made in the bundle, unless it is there.

    Args:
        bundle: its folder; every component is on ONNX Runtime in fp32.
        manifest: its own.
        stage: the component's name.
        way: where to.

    Raises:
        Skipped: the way cannot run here, or the component not in its precision.
        BundleError: the engine refuses the graph.
    """
    component = manifest.components[stage]
    if way.lack:
        raise Skipped(way.lack)
    if way.precision == "fp16" and component.overflows_in_fp16:
        raise Skipped(f"the {stage} overflows in fp16, as its checkpoint says")
    return converted(bundle, component, way.engine, way.precision, manifest.model, Limits.for_model(manifest.model))


def load(bundle: Path, manifest: Manifest, stage: str, way: Way) -> Engine:
    """The component's engine; arguments and errors as `on_way`, and

    Raises:
        BundleError: the engine cannot load it.
    """
    component = on_way(bundle, manifest, stage, way)
    return load_engine(bundle / component.files[0].path, component, threads=0)


def first_loaded(bundle: Path, manifest: Manifest, stage: str, settings: Settings) -> tuple[Way, Engine]:
    """The first way on which the component loads.

    Raises:
        Skipped: there is none; why not.
    """
    reasons = []
    for way in ways(settings):
        try:
            return way, load(bundle, manifest, stage, way)
        except Exception as error:  # whatever an engine raises, the next one may do
            reasons.append(f"{way.engine} {way.precision}: {error}")
    raise Skipped("no engine loads the model. " + "; ".join(reasons))


def expected_outputs(bundle: Path, manifest: Manifest, stage: str, inputs: Arrays) -> Arrays:
    """What ONNX Runtime makes of `inputs` in fp32 on the CPU; kept in the bundle, since a large model takes it a while, so the
    inputs must be the same each time."""
    kept = bundle / f"{stage}.expected.npz"
    if not kept.is_file():
        outputs = OnnxRuntimeEngine(bundle / manifest.components[stage].files[0].path)(inputs)
        aside = kept.with_name(f".{kept.name}")
        with aside.open("wb") as file:
            np.savez(file, **outputs)
        aside.replace(kept)
    with np.load(kept) as arrays:
        return dict(arrays)


def relative_error(outputs: Arrays, expected: Arrays) -> float:
    """The largest error of all elements, as a share of the expected output's standard deviation; not finite if an output is
    not."""
    return max(
        float(np.abs(outputs[name].astype(np.float64) - array).max() / max(array.std(), 1e-30))
        for name, array in expected.items()
    )
