"""Components on ONNX Runtime, in this process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from diffuserve.errors import BundleError

CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
# Left alone, fp32 would be multiplied with the 10 digits of TF32.
_SETTINGS: dict[str, dict[str, str]] = {CUDA: {"use_tf32": "0"}, _CPU: {}}


class OnnxRuntimeEngine:
    """One ONNX model, in the precision that its graph is in. ONNX Runtime's sessions are safe to run from several threads.

    Args:
        path: the .onnx file; weights beside it are found by their names.
        threads: threads of one call on the CPU; 0 means one for each core.
        on_gpu: whether to run on the first NVIDIA GPU instead of the CPU.

    Raises:
        BundleError: onnxruntime is not installed, it has no GPU, or it cannot load the file.
    """

    def __init__(self, path: Path, threads: int = 0, *, on_gpu: bool = False) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise BundleError(
                "The engine onnxruntime is not installed. Install it: pip install 'diffuserve[serve]'"
            ) from error

        # A GPU leaves to the CPU what it cannot do itself. A provider that is missing would be left out with a warning.
        wanted = [CUDA, _CPU] if on_gpu else [_CPU]
        providers = [(name, _SETTINGS[name]) for name in wanted if name in onnxruntime.get_available_providers()]
        try:
            self._session = onnxruntime.InferenceSession(str(path), session_options(threads), providers=providers)
        except Exception as error:  # onnxruntime's exceptions have no common base of their own
            raise BundleError(f"ONNX Runtime cannot load {path}: {error}") from error
        if self._session.get_providers()[0] != wanted[0]:
            raise BundleError(
                f"{path} is to run on an NVIDIA GPU, and ONNX Runtime found none here. See what is missing: diffuserve engines"
            )
        self._outputs = [output.name for output in self._session.get_outputs()]

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs the model; see `diffuserve.stages.Engine`."""
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(inputs)), strict=True))


def session_options(threads: int) -> Any:
    """`onnxruntime.SessionOptions` of every session.

    Args:
        threads: of one call; 0 means one for each core.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Several sessions share the cores. A pool that spins while it has nothing to do takes them from the others.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options
