"""TensorRT plans: graphs that TensorRT has compiled for one GPU architecture, one version of its own, and ranges of shapes.

TensorRT itself has built none yet, since no NVIDIA GPU was at hand; docs/engines.md says what has been tried in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffuserve.bundle.manifest import ModelSpec
from diffuserve.engines.gpu import gpu_architectures
from diffuserve.engines.tensorrt_profiles import Profile, plan_limits, profiles
from diffuserve.engines.tensorrt_progress import progress_monitor
from diffuserve.errors import BundleError
from diffuserve.files import write_whole
from diffuserve.limits import Limits
from diffuserve.tensors import StageSpec

SUFFIX = ".plan"
# What is on the package index fetches the libraries themselves from NVIDIA's own index.
INSTALL = "pip install 'diffuserve[tensorrt]' --extra-index-url https://pypi.nvidia.com"


def plan_path(graph: Path, precision: str, limits: Limits) -> Path:
    """Where the plan of `graph` for this machine lies: beside it, named by what it was built for, rows, pixels and chunks
    first, as in `model.fp16.32x1024x3.sm90.trt11.4.1.plan`.

    Raises:
        BundleError: there is no GPU, or tensorrt is not installed.
    """
    sizes = "x".join(map(str, plan_limits(limits).values()))
    return graph.with_name(f"model.{precision}.{sizes}.{_this_machine()}{SUFFIX}")


def check_plan(path: Path) -> None:
    """Raises:
    BundleError: the plan was built for another GPU or version, with which it could not be loaded.
    """
    built_for = ".".join(path.name.removesuffix(SUFFIX).split(".")[3:])
    here = _this_machine()
    if built_for != here:
        raise BundleError(
            f"{path} was built for {built_for}, and this machine has {here}. Build it here: diffuserve engines BUNDLE "
            "--select tensorrt"
        )


def build_plan(graph: Path, precision: str, tensors: StageSpec, model: ModelSpec, limits: Limits) -> Path:
    """Builds the plan of a graph, strongly typed in `precision`, for this machine and what a server with `limits` may ask of
    it, unless it has been; takes minutes.

    Raises:
        BundleError: TensorRT refuses the graph, or cannot build it.
    """
    path = plan_path(graph, precision, limits)
    if not path.is_file():
        import tensorrt

        # The measurements of kernels, which the next component of the same model can use again.
        timings = graph.parent.parent / f"{_this_machine()}.timings"
        write_whole(path, serialized_plan(tensorrt, graph, profiles(tensors, model, limits), timings))
    return path


def serialized_plan(library: Any, graph: Path, ranges: Sequence[Profile], timings: Path) -> Any:
    """Builds a plan.

    Args:
        library: the module `tensorrt`, or one with the same interface.
        graph: the .onnx file; weights beside it are found by their names.
        ranges: the profiles.
        timings: measurements of kernels are read from there if it exists, and written there.

    Returns:
        A buffer.

    Raises:
        BundleError: TensorRT refuses the graph or a profile, or cannot build it.
    """
    logger = library.Logger(library.Logger.WARNING)
    builder = library.Builder(logger)
    # From version 11 on every network is strongly typed, and before that only those that say so.
    typed = getattr(library.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = library.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        errors = "; ".join(str(parser.get_error(number)) for number in range(parser.num_errors))
        raise BundleError(f"TensorRT cannot read {graph}: {errors}")
    config = builder.create_builder_config()
    config.clear_flag(library.BuilderFlag.TF32)  # fp32 is to be fp32, and not to be multiplied with 10 digits
    for profile in ranges:
        _add_profile(builder, config, profile, graph)
    cache = config.create_timing_cache(timings.read_bytes() if timings.is_file() else b"")
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        # Those of another driver, say; without them the build only takes longer.
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    config.progress_monitor = progress_monitor(library, graph.parent.name)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BundleError(f"TensorRT cannot build {graph}; its own messages above say why.")
    write_whole(timings, config.get_timing_cache().serialize())
    return plan


def _add_profile(builder: Any, config: Any, ranges: Profile, graph: Path) -> None:
    profile = builder.create_optimization_profile()
    try:
        for name, shapes in ranges.items():
            profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
        refused = config.add_optimization_profile(profile) < 0
    except ValueError:
        refused = True
    if refused:
        raise BundleError(f"TensorRT refuses the shapes {ranges} for {graph}; its own messages above say why.")


def _this_machine() -> str:
    architectures = gpu_architectures()
    if not architectures:
        raise BundleError("TensorRT needs an NVIDIA GPU, and none can be seen. See what is missing: diffuserve engines")
    try:
        import tensorrt
    except ImportError as error:
        raise BundleError(f"The engine tensorrt is not installed. Install it: {INSTALL}") from error
    return f"{architectures[0]}.trt{tensorrt.__version__}"
