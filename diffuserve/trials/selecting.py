"""A bundle's components on each engine that this machine has: how fast, how far from the reference, and which is kept.

The reference is ONNX Runtime in fp32 on the CPU, which the export has compared with PyTorch. An engine in another
precision draws slightly other images, so each precision has a tolerance of its own.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from diffuserve.bundle.checksums import verify
from diffuserve.bundle.manifest import Component, ImageParity, Manifest, ModelSpec, Trial, read_manifest, write_manifest
from diffuserve.engines import load_engine
from diffuserve.engines.availability import availability
from diffuserve.engines.example_inputs import Arrays, example_inputs
from diffuserve.engines.warm import warm
from diffuserve.errors import BundleError, StageFailed
from diffuserve.limits import Limits
from diffuserve.stages import Engine, finite_rows
from diffuserve.tensors import UNET
from diffuserve.trials.conversion import converted, remove_what_is_not_used
from diffuserve.trials.image_parity import image_parity, same_engines
from diffuserve.trials.tolerance import tolerance_of

AUTO = "auto"
Way = tuple[str, str]  # engine, precision
# A component, of the bundle in the folder, as an engine runs it in a precision.
Convert = Callable[[Path, Component, str, str], Component]
REFERENCE: Way = ("onnxruntime", "fp32")

# Rows of a call. The UNet runs the most, and in batches; the other components run once an image.
_BATCHES = {UNET: (1, 2, 8)}
_OTHER_BATCHES = (1, 2)
_ROUNDS = 5
# An engine must be faster by this much to be kept instead of the reference: less is within the noise of a machine.
_GAIN = 0.95


def select_engines(
    bundle: Path,
    engine: str,
    precision: str | None = None,
    limits: Limits | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Tries engines on a bundle and writes into its manifest what each component runs on, and the trials.

    Args:
        bundle: its folder.
        engine: one of `diffuserve.engines.ENGINES`, for all components; or "auto": of those that this machine can run,
            the fastest for each component.
        precision: of the engine; None is for each component the first that it may have, which is fp32 on CPUs and fp16 on
            GPUs, or with "auto" any.
        limits: of the servers that TensorRT's plans are built for; by default the model's own.
        progress: called with each component's name before it is tried.

    Returns:
        The new manifest.

    Raises:
        BundleError: the bundle is damaged, or the engine cannot run here or differs too much from the reference.
    """
    manifest = read_manifest(bundle)
    verify(bundle, manifest)
    ways = ways_to_try(engine, precision)
    try:
        convert = partial(converted, model=manifest.model, limits=limits or Limits.for_model(manifest.model))
        manifest = _selected(bundle, manifest, engine, ways, convert, progress)
        write_manifest(bundle, manifest)
    finally:
        for component in manifest.components.values():
            remove_what_is_not_used(bundle, component)
    return manifest


def _selected(
    bundle: Path,
    manifest: Manifest,
    engine: str,
    ways: Sequence[Way],
    convert: Convert,
    progress: Callable[[str], None],
) -> Manifest:
    """The manifest with the engines that the trials of `ways` lead to."""
    known: Arrays = {}
    tried: dict[str, list[Trial]] = {}
    for name, component in manifest.components.items():
        progress(name)
        own_ways = ways if engine == AUTO else first_allowed(ways, component)
        tried[name] = _try(bundle, name, component, manifest.model, own_ways, convert, known)
    _choose(bundle, tried, engine)  # raises if an engine that was named does not do
    progress("an image")
    images = _draw(bundle, manifest, tried, convert)
    components = {
        name: convert(bundle, manifest.components[name], trial.engine, trial.precision)
        for name, trial in _choose(bundle, tried, engine).items()
    }
    if not any(same_engines(image, components) for image in images):
        images.append(image_parity(bundle, manifest, components))
    was, now = manifest.components[UNET], components[UNET]
    # The UNet's costs were measured on the engine that it had.
    unet_seconds = manifest.unet_seconds if (was.engine, was.precision) == (now.engine, now.precision) else {}
    return msgspec.structs.replace(
        manifest,
        components=components,
        images=tuple(images),
        trials=tuple(trial for trials in tried.values() for trial in trials),
        unet_seconds=unet_seconds,
    )


def _choose(bundle: Path, tried: Mapping[str, Sequence[Trial]], engine: str) -> dict[str, Trial]:
    """Each component's trial that is kept."""
    chosen = {name: fastest(trials) if engine == AUTO else trials[-1] for name, trials in tried.items()}
    for name, trial in chosen.items():
        if trial.rejected:
            raise BundleError(
                f"{name} of {bundle} does not run on {trial.engine} in {trial.precision}: {trial.rejected}. Nothing was "
                f"changed. Let the measurement choose: diffuserve engines {bundle} --select auto"
            )
    return chosen


def _draw(bundle: Path, manifest: Manifest, tried: dict[str, list[Trial]], convert: Convert) -> list[ImageParity]:
    """The reference image by each way that runs the UNet, with the reference in the place of what it does not run. A way
    that draws another image, or none that is finite, is rejected in `tried`."""
    images = []
    for position, unet in enumerate(tried[UNET]):
        if unet.rejected:
            continue
        kept = {name: trials[0] if trials[position].rejected else trials[position] for name, trials in tried.items()}
        components = {
            name: convert(bundle, manifest.components[name], trial.engine, trial.precision)
            for name, trial in kept.items()
        }
        try:
            image = image_parity(bundle, manifest, components)
        except StageFailed as error:
            if not position:
                raise
            rejected = f"it draws no image: {error}"
        else:
            images.append(image)
            rejected = "" if image.passed else f"it draws another image: {image}"
        if position and rejected:
            for trials in tried.values():
                if not trials[position].rejected:
                    trials[position] = msgspec.structs.replace(trials[position], seconds={}, rejected=rejected)
    return images


def fastest(trials: Sequence[Trial]) -> Trial:
    """Of one component's trials, the reference's first: the one with the least time, as the geometric mean over the batch
    sizes of its share of the reference's; the reference if that gains too little."""
    reference = trials[0]
    best = min((trial for trial in trials if not trial.rejected), key=lambda trial: relative_time(trial, reference))
    return best if relative_time(best, reference) < _GAIN else reference


def relative_time(trial: Trial, reference: Trial) -> float:
    """The geometric mean over batch sizes of `trial`'s seconds as a share of the reference's."""
    shares = [math.log(trial.seconds[batch] / seconds) for batch, seconds in reference.seconds.items()]
    return math.exp(statistics.fmean(shares))


def refusal(component: Component, precision: str) -> str:
    """Why the component must not run in `precision`; empty if it may."""
    if precision == "fp16" and component.overflows_in_fp16:
        return "it overflows in fp16, as the checkpoint says"
    return ""


def first_allowed(ways: Sequence[Way], component: Component) -> list[Way]:
    """The reference, and of the other ways the first that the component may run; the first of all if it may run none."""
    allowed = [way for way in ways[1:] if not refusal(component, way[1])]
    return [ways[0], *(allowed or ways[1:])[:1]]


def ways_to_try(engine: str, precision: str | None) -> list[Way]:
    """The engines and precisions that `select_engines` tries, the reference first, then those that were asked for and can
    run here, in the order of preference.

    Raises:
        BundleError: there is no such engine, or this machine cannot run it; why, and what fixes it.
    """
    known = {(way.engine, way.precision): way for way in availability()}
    if engine == AUTO:
        asked = [way for way, available in known.items() if available.usable and precision in (None, way[1])]
    else:
        having = [way for way in known if way[0] == engine and precision in (None, way[1])]
        asked = [way for way in having if known[way].usable] or having[:1]
        if not asked:
            named = f"{engine} in {precision}" if precision else engine
            raise BundleError(f"There is no engine {named}. There are: {', '.join(' in '.join(way) for way in known)}.")
    for way in [REFERENCE, *asked]:
        if missing := known[way].missing:
            reasons = "; ".join(map(str, missing))
            raise BundleError(f"{way[0]} in {way[1]} cannot run here: {reasons}.")
    return [REFERENCE, *(way for way in asked if way != REFERENCE)]


def _try(
    bundle: Path,
    name: str,
    component: Component,
    model: ModelSpec,
    ways: Sequence[Way],
    convert: Convert,
    known: Arrays,
) -> list[Trial]:
    """One component's trials, in the order of `ways`, the reference's first; adds the reference's outputs to `known`."""
    batches = _BATCHES.get(name, _OTHER_BATCHES)
    # One size more, since an engine may have compiled the native one into the graph.
    taller = msgspec.structs.replace(model, height=model.height + model.size_multiple)
    inputs = [
        example_inputs(component.tensors, size, batch, known)
        for batch, size in [*((batch, model) for batch in batches), (2, taller)]
    ]

    def load(way: Way) -> Engine:
        candidate = convert(bundle, component, *way)
        engine = load_engine(bundle / candidate.files[0].path, candidate, threads=0)
        warm(engine, candidate, model)  # as a server does: what is called first has mattered
        return engine

    engines = {REFERENCE: load(REFERENCE)}
    expected = [engines[REFERENCE](arrays) for arrays in inputs]
    if not all(finite_rows(outputs).all() for outputs in expected):
        raise BundleError(
            f"{name} of {bundle} returns values that are not finite on {' in '.join(REFERENCE)}, so nothing can be compared "
            "with it. Export the checkpoint again."
        )
    known.update(expected[len(batches) - 1])
    trials = {REFERENCE: Trial(name, *REFERENCE, {}, 0.0, 0.0, "")}
    for way in ways[1:]:
        tolerance, error = tolerance_of(component.tensors, way[1], expected[0]), None
        rejected = refusal(component, way[1])
        if not rejected:
            try:
                engine = load(way)
                outputs = [engine(arrays) for arrays in inputs]
            except Exception as failure:  # whatever an engine raises, it is not the one to take
                rejected = f"it fails: {failure}"
            else:
                rejected = _flaw(outputs, expected)
                if not rejected and (error := _largest_error(outputs, expected)) > tolerance:
                    rejected = f"it differs by up to {error:.3g}, and {tolerance:.3g} is allowed"
                if not rejected:
                    engines[way] = engine
        trials[way] = Trial(name, *way, {}, error, tolerance, rejected)
    seconds = _seconds(engines, dict(zip(batches, inputs, strict=False)))
    return [msgspec.structs.replace(trial, seconds=seconds.get(way, {})) for way, trial in trials.items()]


def _flaw(outputs: Sequence[Arrays], expected: Sequence[Arrays]) -> str:
    """Why outputs cannot be compared with what is expected; empty if they can."""
    for arrays, references in zip(outputs, expected, strict=True):
        for name, reference in references.items():
            actual = arrays[name]
            if (actual.shape, actual.dtype) != (reference.shape, reference.dtype):
                return f"its {name} is {actual.dtype} {actual.shape}, where {reference.dtype} {reference.shape} is expected"
        if not finite_rows(arrays).all():
            return "its output is not finite"
    return ""


def _largest_error(outputs: Sequence[Arrays], expected: Sequence[Arrays]) -> float:
    """Over all elements of all outputs."""
    return max(
        float(np.abs(arrays[name].astype(np.float64) - reference).max())
        for arrays, references in zip(outputs, expected, strict=True)
        for name, reference in references.items()
    )


def _seconds(engines: Mapping[Way, Engine], inputs: Mapping[int, Arrays]) -> dict[Way, dict[int, float]]:
    """Seconds of a call by batch size, the median over rounds. Each round calls every engine in turn, so that a slow spell
    of the machine falls on all of them alike."""
    times_s: dict[Way, dict[int, list[float]]] = {way: {batch: [] for batch in inputs} for way in engines}
    for _ in range(_ROUNDS):
        for batch, arrays in inputs.items():
            for way, engine in engines.items():
                started_s = time.perf_counter()
                engine(arrays)
                times_s[way][batch].append(time.perf_counter() - started_s)
    return {
        way: {batch: statistics.median(each) for batch, each in by_batch.items()} for way, by_batch in times_s.items()
    }
