"""Components on ONNX Runtime, in this process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from diffuserve.engines.compiled_cache import CompiledCache
from diffuserve.engines.fused_attention import fuse_attention
from diffuserve.errors import BundleError

if TYPE_CHECKING:
    from diffuserve.bundle import Component

CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
_GRAPH_NAME = "model.onnx"
_WEIGHTS_NAME = "model.onnx.data"
# Raised whenever `fuse_attention` makes other graphs.
_FUSION_REVISION = 1


class OnnxRuntimeEngine:
    """One ONNX model, in fp32 on the CPU or in fp16 on the first NVIDIA GPU. ONNX Runtime's sessions are safe to run from
    several threads.

    On the CPU the graph as ONNX Runtime optimises it for this processor is stored, so that the next start only loads it:
    its weights are then mapped from the file, and not copied.

    Args:
        path: the .onnx file; weights beside it are found by their names.
        component: what the manifest says of it; None for a file in fp32 that nothing is to be stored of.
        threads: threads of one call on the CPU; 0 means one for each core.

    Raises:
        BundleError: onnxruntime is not installed, it has no GPU for fp16, or it cannot load the file.
    """

    def __init__(self, path: Path, component: Component | None = None, threads: int = 0) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise BundleError(
                "The engine onnxruntime is not installed. Install it: pip install 'diffuserve[serve]'"
            ) from error

        precision = component.precision if component else "fp32"
        # A GPU leaves to the CPU what it cannot do itself. A provider that is missing would be left out with a warning.
        wanted = [CUDA, _CPU] if precision == "fp16" else [_CPU]
        self._providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
        self._threads = threads
        try:
            if component is None or CUDA in self._providers:
                self._session = self._optimised(path)
            else:
                self._session = self._cached(path, component)
        except Exception as error:  # onnxruntime's exceptions have no common base of their own
            raise BundleError(f"ONNX Runtime cannot load {path}: {error}") from error
        if self._session.get_providers()[0] != wanted[0]:
            raise BundleError(
                f"{path} is in {precision}, which ONNX Runtime runs on NVIDIA GPUs only, and it found none here. See what is "
                "missing: diffuserve engines"
            )
        self._outputs = [output.name for output in self._session.get_outputs()]

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs the model; see `diffuserve.stages.Engine`."""
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(inputs)), strict=True))

    def _options(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        # Several sessions share the cores. A pool that spins while it has nothing to do takes them from the others.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        return options

    def _session_of(self, graph: str | bytes, options: Any) -> Any:
        import onnxruntime

        return onnxruntime.InferenceSession(graph, options, providers=self._providers)

    def _optimised(self, path: Path, store: Path | None = None) -> Any:
        """A session on the graph, its attention fused; the optimised graph is written to the folder `store`."""
        import onnx

        model = onnx.load(path, load_external_data=False)
        fuse_attention(model)
        options = self._options()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        if store is not None:
            options.optimized_model_filepath = str(store / _GRAPH_NAME)
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", _WEIGHTS_NAME)
            options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        return self._session_of(model.SerializeToString(), options)

    def _cached(self, path: Path, component: Component) -> Any:
        """A session on the optimised graph, from the cache if it is there."""
        import onnxruntime

        settings = {"fusion": _FUSION_REVISION}
        cache = CompiledCache(path, component, onnxruntime.__version__, settings)
        for entry in cache.entries():
            options = self._options()
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            try:
                return self._session_of(str(entry / _GRAPH_NAME), options)
            except Exception as error:
                cache.discard(entry, error)
        with cache.writing() as folder:
            session = self._optimised(path, folder)
        return session
