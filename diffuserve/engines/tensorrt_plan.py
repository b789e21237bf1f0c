"""TensorRT plans: graphs that TensorRT has compiled for one GPU architecture, one version of its own, and ranges of shapes.

No plan has been built yet, since no NVIDIA GPU was at hand: of this module only the profiles and the names are tested.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from diffuserve.bundle import ModelSpec
from diffuserve.decoding import MAX_DECODE_BATCH
from diffuserve.engines.example import native_dims
from diffuserve.engines.gpu import gpu_architectures
from diffuserve.errors import BundleError
from diffuserve.files import write_whole
from diffuserve.request import Limits
from diffuserve.tensors import CLIP_INPUT, StageSpec, TensorSpec

SUFFIX = ".plan"
# Batch sizes that get a profile of their own at the native size, with kernels chosen for exactly that shape.
_STATIC_BATCHES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class ShapeRange:
    """The smallest and largest shape that an input may have, batch included, and the one to be fastest at."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


# One range for each input, by name.
Profile = dict[str, ShapeRange]


def profiles(tensors: StageSpec, model: ModelSpec) -> list[Profile]:
    """What a plan is built for: first each of the usual batches at the native size, last any batch, image size and
    length of a prompt that the server's limits allow."""
    limits = Limits.for_model(model)
    has_images = any(spec.dims[-1] == 3 or spec.name == CLIP_INPUT for spec in (*tensors.inputs, *tensors.outputs))
    most_rows = MAX_DECODE_BATCH if has_images else limits.max_rows
    batches = [batch for batch in _STATIC_BATCHES if batch <= most_rows]
    least_px, most_px = model.size_multiple, limits.max_side_px - limits.max_side_px % model.size_multiple

    def shape(spec: TensorSpec, batch: int, width: int, height: int, chunks: int = 1) -> tuple[int, ...]:
        size = msgspec.structs.replace(model, width=width, height=height, max_tokens=chunks * model.max_tokens)
        return (batch, *native_dims(spec, size))

    def any_shape(spec: TensorSpec) -> ShapeRange:
        return ShapeRange(
            shape(spec, 1, least_px, least_px),
            shape(spec, batches[len(batches) // 2], model.width, model.height),
            shape(spec, most_rows, most_px, most_px, limits.max_prompt_chunks),
        )

    def one_shape(spec: TensorSpec, batch: int) -> ShapeRange:
        return ShapeRange(*[shape(spec, batch, model.width, model.height)] * 3)

    return [
        *({spec.name: one_shape(spec, batch) for spec in tensors.inputs} for batch in batches),
        {spec.name: any_shape(spec) for spec in tensors.inputs},
    ]


def plan_path(graph: Path, precision: str) -> Path:
    """Where the plan of `graph` for this machine lies: beside it, named by what it was built for, as in
    `model.fp16.sm90.trt11.4.1.plan`.

    Raises:
        BundleError: there is no GPU, or tensorrt is not installed.
    """
    return graph.with_name(f"model.{precision}.{_this_machine()}{SUFFIX}")


def check_plan(path: Path) -> None:
    """Raises:
    BundleError: the plan was built for another GPU or version, with which it could not be loaded.
    """
    built_for = ".".join(path.name.removesuffix(SUFFIX).split(".")[2:])
    here = _this_machine()
    if built_for != here:
        raise BundleError(
            f"{path} was built for {built_for}, and this machine has {here}. Build it here: diffuserve engines BUNDLE "
            "--select tensorrt"
        )


def build_plan(graph: Path, precision: str, tensors: StageSpec, model: ModelSpec) -> Path:
    """Builds the plan of a graph, strongly typed in `precision`, for this machine, unless it has been; takes minutes.

    Raises:
        BundleError: TensorRT refuses the graph, or cannot build it.
    """
    path = plan_path(graph, precision)
    if path.is_file():
        return path
    import tensorrt

    logger = tensorrt.Logger(tensorrt.Logger.WARNING)
    builder = tensorrt.Builder(logger)
    # From version 11 on every network is strongly typed, and before that only those that say so.
    typed = getattr(tensorrt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        errors = "; ".join(str(parser.get_error(number)) for number in range(parser.num_errors))
        raise BundleError(f"TensorRT cannot read {graph}: {errors}")
    config = builder.create_builder_config()
    config.clear_flag(tensorrt.BuilderFlag.TF32)  # fp32 is to be fp32, and not to be multiplied with 10 digits
    for ranges in profiles(tensors, model):
        profile = builder.create_optimization_profile()
        for name, shapes in ranges.items():
            profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
        config.add_optimization_profile(profile)
    # The measurements of kernels, which the next component of the same model can use again.
    timings = graph.parent.parent / f"{_this_machine()}.timings"
    cache = config.create_timing_cache(timings.read_bytes() if timings.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    config.progress_monitor = _progress(graph)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BundleError(f"TensorRT cannot build {graph}; its own messages above say why.")
    write_whole(timings, config.get_timing_cache().serialize())
    write_whole(path, plan)
    return path


def _this_machine() -> str:
    architectures = gpu_architectures()
    if not architectures:
        raise BundleError("TensorRT needs an NVIDIA GPU, and none can be seen. See what is missing: diffuserve engines")
    try:
        import tensorrt
    except ImportError as error:
        raise BundleError(
            "The engine tensorrt is not installed. Install it: pip install 'diffuserve[tensorrt]'"
        ) from error
    return f"{architectures[0]}.trt{tensorrt.__version__}"


def _progress(graph: Path) -> Any:
    """TensorRT's phases as progress bars."""
    import tensorrt
    from tqdm import tqdm

    class Progress(tensorrt.IProgressMonitor):  # type: ignore[misc]  # untyped
        def __init__(self) -> None:
            super().__init__()
            self._bars: dict[str, tqdm] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._bars[phase_name] = tqdm(total=num_steps, desc=f"{graph.parent.name}: {phase_name}", leave=False)

        def step_complete(self, phase_name: str, step: int) -> bool:
            bar = self._bars[phase_name]
            bar.update(step + 1 - bar.n)
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            self._bars.pop(phase_name).close()

    return Progress()
