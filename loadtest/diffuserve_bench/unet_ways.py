"""The ways to run a UNet on a CPU: loading each, and asking it where its time goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from diffuserve.engines.availability import availability
from diffuserve.engines.onnxruntime import OnnxRuntimeEngine
from diffuserve.engines.openvino import cpu_properties
from diffuserve.engines.processor import computes_bf16, processor_name
from diffuserve.errors import CheckpointError
from diffuserve.stages import Engine
from diffuserve_bench.onnxruntime_profile import node_calls
from diffuserve_bench.torch_unet import TorchUnet

Arrays = Mapping[str, NDArray[Any]]

_PROFILED_CALLS = 3


@dataclass(frozen=True)
class Way:
    """`source`: the .onnx file, for PyTorch the checkpoint; `shapes`: "any", or "fixed" if it is compiled for those of the
    call; `lack`: why it cannot run here, else empty."""

    engine: str
    precision: str
    source: Path
    shapes: str = "any"
    lack: str = ""

    def __str__(self) -> str:
        return f"{self.engine} {self.precision}" + (", fixed shapes" if self.shapes == "fixed" else "")


def ways(graph: Path, checkpoint: Path | None) -> list[Way]:
    """All of them, ONNX Runtime in fp32 first, those that cannot run here too. PyTorch's are there if there is a
    checkpoint."""
    found = []
    for each in availability():
        lack = "; ".join(f"{missing.reason} ({missing.fix})" for missing in each.missing)
        if each.engine in ("onnxruntime", "openvino"):
            found.append(Way(each.engine, each.precision, graph, lack=lack))
        if each.engine == "openvino":
            found.append(Way(each.engine, each.precision, graph, "fixed", lack))
    if checkpoint is not None:
        no_bf16 = "" if computes_bf16() else f"this processor ({processor_name()}) has no bf16 arithmetic"
        found += [Way("pytorch", "fp32", checkpoint), Way("pytorch", "bf16", checkpoint, lack=no_bf16)]
    return found


def load(way: Way, inputs: Arrays) -> Engine:
    """Args:
        way: what to load; it has no lack.
        inputs: of the calls to come.

    Raises:
        BundleError, CheckpointError: it cannot be loaded.
    """
    if way.engine == "onnxruntime":
        return OnnxRuntimeEngine(way.source)
    if way.engine == "openvino":
        return _OpenVino(way, inputs)
    return _pytorch(way)


def operator_seconds(way: Way, inputs: Arrays) -> dict[str, float]:
    """Seconds of a call by type of operator, those with the most first, as the engine's own profiler has them. Profiling
    costs time itself, so it is loaded anew for it."""
    if way.engine == "onnxruntime":
        seconds = _onnxruntime_seconds(way.source, inputs)
    elif way.engine == "openvino":
        seconds = _OpenVino(way, inputs, profile=True).operator_seconds(inputs)
    else:
        seconds = _pytorch_seconds(_pytorch(way), inputs)
    return dict(sorted(((name, each / _PROFILED_CALLS) for name, each in seconds.items()), key=lambda item: -item[1]))


class _OpenVino:
    """As `diffuserve.engines.openvino`, but compiled for this run only and, if the way says so, for one shape."""

    def __init__(self, way: Way, inputs: Arrays, profile: bool = False) -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model(way.source)
        if way.shapes == "fixed":
            model.reshape({name: list(array.shape) for name, array in inputs.items()})
        properties = {**cpu_properties(way.precision, threads=0), "PERF_COUNT": profile}
        self._request = core.compile_model(model, "CPU", properties).create_infer_request()

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        return {"noise_pred": self._request.infer(dict(inputs), share_inputs=True)[0]}

    def operator_seconds(self, inputs: Arrays) -> dict[str, float]:
        seconds: dict[str, float] = defaultdict(float)
        for call in range(1 + _PROFILED_CALLS):
            self(inputs)
            for info in self._request.profiling_info if call else ():
                seconds[info.node_type] += info.real_time.total_seconds()
        return {name: each for name, each in seconds.items() if each}


def _pytorch(way: Way) -> TorchUnet:
    """In bf16 with channels last, which its convolutions prefer."""
    import torch
    from diffusers import UNet2DConditionModel

    unet_class: Any = UNet2DConditionModel  # untyped
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[way.precision]
    try:
        unet = unet_class.from_pretrained(
            way.source / "unet", torch_dtype=dtype, use_safetensors=True, local_files_only=True
        ).eval()
    except OSError as error:
        raise CheckpointError(f"{way.source} has no UNet in diffusers' format: {error}") from error
    return TorchUnet(unet.to(memory_format=torch.channels_last) if way.precision == "bf16" else unet)


def _onnxruntime_seconds(path: Path, inputs: Arrays) -> dict[str, float]:
    seconds: dict[str, float] = defaultdict(float)
    for call in node_calls(path, inputs, _PROFILED_CALLS):
        seconds[call.operator] += call.seconds
    return seconds


def _pytorch_seconds(engine: Engine, inputs: Arrays) -> dict[str, float]:
    from torch.profiler import ProfilerActivity, profile

    engine(inputs)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(_PROFILED_CALLS):
            engine(inputs)
    return {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
