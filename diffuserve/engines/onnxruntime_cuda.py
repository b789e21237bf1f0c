"""Components on ONNX Runtime and an NVIDIA GPU, in this process."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from diffuserve.engines.bound_session import BoundSession
from diffuserve.engines.gpu import free_memory_bytes, gpu_architectures
from diffuserve.engines.onnxruntime import CPU, fused_session, imported_onnxruntime, session_options
from diffuserve.engines.sessions_by_rows import SessionsByRows
from diffuserve.engines.unavailable import NO_GPU, Unavailable
from diffuserve.errors import BundleError

if TYPE_CHECKING:
    from diffuserve.bundle.manifest import Component

CUDA = "CUDAExecutionProvider"
# How many times the model's weights must be free for another session: its own, and what its calls compute in between.
_FREE_MODELS = 4
_MISSING = re.compile(r"Failed to load (\S+?):")


class OnnxRuntimeCudaEngine:
    """One ONNX model on the first GPU, in the precision that its graph is in.

    Args:
        path: the .onnx file; weights beside it are found by their names.
        component: what the manifest says of it.

    Raises:
        BundleError: onnxruntime is not installed, it cannot use a GPU, or it cannot load the file.
    """

    def __init__(self, path: Path, component: Component) -> None:
        from diffuserve.graphs.fused_for_cuda import fuse_for_cuda

        runtime = imported_onnxruntime()
        if missing := cuda_unavailable(runtime, gpu_architectures()):
            raise BundleError(f"{path} is to run on an NVIDIA GPU, which ONNX Runtime cannot do here: {missing}.")
        providers = [(CUDA, cuda_options(component.precision)), CPU]  # what a GPU cannot do is left to the CPU
        model_bytes = sum(file.size_bytes for file in component.files if file.path.startswith(component.files[0].path))

        def make() -> BoundSession:
            session = fused_session(path, session_options(threads=0), providers, fuse_for_cuda)
            return BoundSession(session, component.tensors, "cuda")

        try:
            self._run = SessionsByRows(make, lambda: free_memory_bytes() >= _FREE_MODELS * model_bytes)
        except Exception as error:  # onnxruntime's exceptions have no common base of their own
            raise BundleError(f"ONNX Runtime cannot load {path}: {error}") from error

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs the model; see `diffuserve.stages.Engine` and `SessionsByRows`."""
        return self._run(inputs)


def cuda_options(precision: str) -> dict[str, str]:
    """ONNX Runtime's options for CUDA, for a graph in "fp16" or in fp32."""
    return {
        # How each new shape of a convolution is planned: from cuDNN's quick heuristic, and not the thorough one.
        "cudnn_conv_algo_search": "HEURISTIC",
        # Left alone, fp32 would be multiplied with the 10 digits of TF32. Where TF32 is off, convolutions avoid tensor cores
        # altogether, in fp16 too.
        "use_tf32": "1" if precision == "fp16" else "0",
    }


def cuda_unavailable(runtime: Any, architectures: Sequence[str]) -> Unavailable | None:
    """Why ONNX Runtime cannot use a GPU here; None if it can, as a small session on one has shown.

    Args:
        runtime: the module `onnxruntime`.
        architectures: the GPUs that the driver sees.
    """
    if CUDA not in runtime.get_available_providers():
        return Unavailable(
            f"onnxruntime {runtime.__version__} was built without CUDA",
            "pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'",
        )
    if not architectures:
        return NO_GPU
    missing = _preload(runtime)
    # A provider whose libraries are missing is left out with a message on the standard error stream.
    if CUDA in runtime.InferenceSession(_small_graph(), providers=[CUDA, CPU]).get_providers():
        return None
    which = ", ".join(missing) or "its own message above names them"
    return Unavailable(
        f"onnxruntime {runtime.__version__} was built with CUDA and cannot load it; missing: {which}",
        "pip install 'onnxruntime-gpu[cuda,cudnn]', or PyTorch for the same CUDA",
    )


def _preload(runtime: Any) -> list[str]:
    """Loads the CUDA libraries that pip has installed, which ONNX Runtime does not look for by itself. Returns the names of
    those that were not found."""
    if not hasattr(runtime, "preload_dlls"):  # before release 1.21
        return []
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        runtime.preload_dlls()
    return _MISSING.findall(said.getvalue())


def _small_graph() -> bytes:
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "small", [x], [y])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    serialized: bytes = made.SerializeToString()
    return serialized
