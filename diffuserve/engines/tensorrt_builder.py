"""Builds plans. TensorRT itself has built none yet, since no NVIDIA GPU was at hand; TensorRT for RTX needs none, and has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffuserve.bundle.manifest import ModelSpec
from diffuserve.engines.tensorrt_library import Library
from diffuserve.engines.tensorrt_messages import messages
from diffuserve.engines.tensorrt_plan import plan_architectures, plan_path
from diffuserve.engines.tensorrt_profiles import Profile, profiles
from diffuserve.engines.tensorrt_progress import progress_monitor
from diffuserve.errors import BundleError
from diffuserve.files import write_whole
from diffuserve.limits import Limits
from diffuserve.tensors import StageSpec


def build_plan(
    library: Library,
    graph: Path,
    precision: str,
    tensors: StageSpec,
    model: ModelSpec,
    limits: Limits,
    architectures: Sequence[str] = (),
) -> Path:
    """Builds the plan of a graph, strongly typed in `precision`, for GPUs of these architectures, or if there are none this
    machine's, and what a server with `limits` may ask of it, unless it has been; takes minutes.

    Raises:
        BundleError: the library refuses the graph, or cannot build it.
    """
    path = plan_path(library, graph, precision, limits, architectures)
    if not path.is_file():
        built_for = plan_architectures(path)
        timings = None
        if not library.compiles_when_loaded:
            # The measurements of kernels, which the next component of the same model can use again.
            timings = graph.parent.parent / f"{built_for[0]}.{library.version()}.timings"
        write_whole(path, serialized_plan(library, graph, profiles(tensors, model, limits), built_for, timings))
    return path


def serialized_plan(
    library: Library, graph: Path, ranges: Sequence[Profile], architectures: Sequence[str], timings: Path | None = None
) -> Any:
    """Builds a plan.

    Args:
        library: that builds it.
        graph: the .onnx file; weights beside it are found by their names.
        ranges: the profiles.
        architectures: of the GPUs that it is for; without a choice where the library builds for the one that is here.
        timings: measurements of kernels are read from there if it exists, and written there. None: none are made.

    Returns:
        A buffer.

    Raises:
        BundleError: the library is not installed, refuses the graph, a profile or an architecture, or cannot build it.
    """
    module = library.load()
    logger = messages(module)
    logger.errors.clear()
    builder = module.Builder(logger)
    # From version 11 on every network is strongly typed, and before that only those that say so.
    typed = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = module.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        errors = "; ".join(str(parser.get_error(number)) for number in range(parser.num_errors))
        raise BundleError(f"{library.title} cannot read {graph}: {errors}")
    config = builder.create_builder_config()
    config.clear_flag(module.BuilderFlag.TF32)  # fp32 is to be fp32, and not to be multiplied with 10 digits
    if library.compiles_when_loaded:
        _set_architectures(library, config, architectures)
    for profile in ranges:
        if not _takes_profile(builder, config, profile):
            raise BundleError(f"{library.title} refuses the shapes {profile} for {graph}{_because(logger)}")
    if timings:
        _use_timings(config, timings)
    config.progress_monitor = progress_monitor(module, graph.parent.name)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BundleError(f"{library.title} cannot build {graph}{_because(logger)}")
    if timings:
        write_whole(timings, config.get_timing_cache().serialize())
    return plan


def _set_architectures(library: Library, config: Any, architectures: Sequence[str]) -> None:
    config.num_compute_capabilities = len(architectures)
    for number, name in enumerate(architectures):
        capability = library.load().ComputeCapability.__members__.get(name.upper())
        if capability is None or not config.set_compute_capability(capability, number):
            raise BundleError(f"{library.title} of this version ({library.version()}) does not build for {name}.")


def _takes_profile(builder: Any, config: Any, ranges: Profile) -> bool:
    profile = builder.create_optimization_profile()
    try:
        for name, shapes in ranges.items():
            profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
        return bool(config.add_optimization_profile(profile) >= 0)
    except ValueError:
        return False


def _use_timings(config: Any, timings: Path) -> None:
    cache = config.create_timing_cache(timings.read_bytes() if timings.is_file() else b"")
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        # Those of another driver, say; without them the build only takes longer.
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _because(logger: Any) -> str:
    return f": {'; '.join(logger.errors)}" if logger.errors else "."
