"""Components on ONNX Runtime and the CPU, in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from diffuserve.engines.compiled_cache import CompiledCache
from diffuserve.errors import BundleError
from diffuserve.graphs.fused_attention import fuse_attention

if TYPE_CHECKING:
    from onnx import ModelProto

    from diffuserve.bundle.manifest import Component

CPU = "CPUExecutionProvider"
_GRAPH_NAME = "model.onnx"
_STORED_WEIGHTS = "session.optimized_model_external_initializers"
# Raised whenever `fuse_attention` makes other graphs.
_FUSION_REVISION = 2


class OnnxRuntimeEngine:
    """One ONNX model, in the precision that its graph is in. ONNX Runtime's sessions are safe to run from several threads.

    The graph as ONNX Runtime optimises it for this processor is stored, so that the next start only loads it: its weights
    are then mapped from the file, and not copied.

    Args:
        path: the .onnx file; weights beside it are found by their names.
        component: what the manifest says of it; None for a file in fp32 that nothing is to be stored of.
        threads: threads of one call; 0 means one for each core.

    Raises:
        BundleError: onnxruntime is not installed, or it cannot load the file.
    """

    def __init__(self, path: Path, component: Component | None = None, threads: int = 0) -> None:
        imported_onnxruntime()
        try:
            if component is None:
                self._session = fused_session(path, session_options(threads), [CPU])
            else:
                self._session = self._cached(path, component, threads)
        except Exception as error:  # onnxruntime's exceptions have no common base of their own
            raise BundleError(f"ONNX Runtime cannot load {path}: {error}") from error
        self._outputs = [output.name for output in self._session.get_outputs()]

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs the model; see `diffuserve.stages.Engine`."""
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(inputs)), strict=True))

    def _cached(self, path: Path, component: Component, threads: int) -> Any:
        """A session on the optimised graph, from the cache if it is there."""
        import onnxruntime

        cache = CompiledCache(path, component, onnxruntime.__version__, {"fusion": _FUSION_REVISION})

        def load(entry: Path) -> Any:
            options = session_options(threads)
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            return onnxruntime.InferenceSession(str(entry / _GRAPH_NAME), options, providers=[CPU])

        # onnxruntime's exceptions have no common base of their own
        if (kept := cache.loaded(load, Exception)) is not None:
            return kept
        options = session_options(threads)
        with cache.writing() as folder:
            if folder is not None:
                options.optimized_model_filepath = str(folder / _GRAPH_NAME)
                options.add_session_config_entry(f"{_STORED_WEIGHTS}_file_name", f"{_GRAPH_NAME}.data")
                options.add_session_config_entry(f"{_STORED_WEIGHTS}_min_size_in_bytes", "1024")
            session = fused_session(path, options, [CPU])
        return session


def imported_onnxruntime() -> Any:
    """The module.

    Raises:
        BundleError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BundleError(
            "The engine onnxruntime is not installed. Install it: pip install 'diffuserve[serve]'"
        ) from error
    return onnxruntime


def fused_session(
    path: Path, options: Any, providers: Sequence[Any], fuse: Callable[[ModelProto], object] = fuse_attention
) -> Any:
    """An `onnxruntime.InferenceSession` on the graph with its attention fused.

    Args:
        path: the .onnx file; weights beside it are found by their names.
        options: `session_options`; is changed.
        providers: ONNX Runtime's, the first choice first. It takes no other one where these fail.
        fuse: changes the graph.
    """
    import onnx
    import onnxruntime

    model = onnx.load(path, load_external_data=False)
    fuse(model)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers, enable_fallback=0)


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
