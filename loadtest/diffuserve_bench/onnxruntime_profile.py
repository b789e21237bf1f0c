"""What ONNX Runtime's profiler says of a graph's nodes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from diffuserve.engines.onnxruntime import fused_session, session_options

_CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class NodeCall:
    """One call of one node on the CPU; the shapes are those of its inputs and outputs, in order."""

    operator: str
    seconds: float
    input_shapes: list[tuple[int, ...]]
    output_shapes: list[tuple[int, ...]]


def node_calls(path: Path, inputs: Mapping[str, NDArray[Any]], calls: int, *, optimised: bool = True) -> list[NodeCall]:
    """Runs the graph `calls` times.

    Args:
        path: the .onnx file.
        inputs: by name.
        calls: of the whole graph.
        optimised: whether as the engine runs it, or node by node as the file has them.
    """
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = session_options(threads=0)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        if optimised:
            session = fused_session(path, options, [_CPU])
        else:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            session = onnxruntime.InferenceSession(str(path), options, providers=[_CPU])
        for _ in range(calls):
            session.run(None, dict(inputs))
        events = json.loads(Path(session.end_profiling()).read_text())
    return [
        NodeCall(
            event["args"]["op_name"],
            event["dur"] / 1e6,
            _shapes(event["args"]["input_type_shape"]),
            _shapes(event["args"]["output_type_shape"]),
        )
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    ]


def _shapes(described: list[dict[str, list[int]]]) -> list[tuple[int, ...]]:
    """Each is a shape by its type's name."""
    return [tuple(shape) for each in described for shape in each.values()]
