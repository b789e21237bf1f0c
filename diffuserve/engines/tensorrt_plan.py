"""Plans, graphs that TensorRT has compiled for GPU architectures, one version of its own, and ranges of shapes: what they are
called, and which can be loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffuserve.engines.gpu import gpu_architectures
from diffuserve.engines.tensorrt_library import Library
from diffuserve.engines.tensorrt_profiles import plan_limits
from diffuserve.errors import BundleError
from diffuserve.limits import Limits

SUFFIX = ".plan"


def plan_path(library: Library, graph: Path, precision: str, limits: Limits, architectures: Sequence[str] = ()) -> Path:
    """Where the plan of `graph` lies: beside it, named by what it was built for, rows, pixels and chunks first, as in
    `model.fp16.32x1024x3.sm86-sm89.rtx1.7.1.116.plan`.

    Args:
        library: that builds it.
        graph: the .onnx file.
        precision: the graph's.
        limits: of the servers that it is for.
        architectures: of the GPUs that it is for. If there are none: the path of a plan that is there and runs on this
            machine's GPU, with the fewest others; else of one for this GPU.

    Raises:
        BundleError: the library is not installed, or there is no GPU where none was named.
    """
    sizes = "x".join(map(str, plan_limits(limits).values()))
    version = library.version()

    def path(names: str) -> Path:
        return graph.with_name(f"model.{precision}.{sizes}.{names}.{version}{SUFFIX}")

    if architectures:
        return path("-".join(architectures))
    gpu = _gpu(library)
    there = [each for each in graph.parent.glob(path("*").name) if gpu in plan_architectures(each)]
    return min(there, key=lambda each: len(plan_architectures(each)), default=path(gpu))


def plan_architectures(path: Path) -> list[str]:
    """Those that a plan was built for, as its name says."""
    return path.name.split(".")[3].split("-")


def check_plan(library: Library, path: Path) -> None:
    """Raises:
    BundleError: the plan was built for another GPU or version, with which it could not be loaded.
    """
    built_for = path.name.removesuffix(SUFFIX).split(".", 3)[3]
    version = built_for.partition(".")[2]
    here = f"{_gpu(library)}.{library.version()}"
    if here not in [f"{architecture}.{version}" for architecture in plan_architectures(path)]:
        raise BundleError(
            f"{path} was built for {built_for}, and this machine has {here}. Build it here: diffuserve engines BUNDLE "
            f"--select {library.engine}"
        )


def _gpu(library: Library) -> str:
    architectures = gpu_architectures()
    if not architectures:
        raise BundleError(
            f"{library.title} needs an NVIDIA GPU, and none can be seen. See what is missing: diffuserve engines"
        )
    return architectures[0]
