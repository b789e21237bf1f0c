"""Components on TensorRT or TensorRT for RTX, in this process. Neither has run, since no GPU for it was at hand; see
docs/engines.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from diffuserve.engines.compiled_cache import CompiledCache
from diffuserve.engines.plan_runner import PlanRunner
from diffuserve.engines.tensorrt_kernels import CompiledKernels
from diffuserve.engines.tensorrt_library import LIBRARIES, Library
from diffuserve.engines.tensorrt_messages import messages
from diffuserve.engines.tensorrt_plan import check_plan
from diffuserve.engines.tensorrt_profiles import Profile, ShapeRange
from diffuserve.errors import BundleError, StageFailed

if TYPE_CHECKING:
    from diffuserve.bundle.manifest import Component


class TensorRtEngine:
    """One plan on the first GPU. Calls from several threads run one after another.

    Args:
        path: the .plan file.
        component: what the manifest says of it; its engine is one of `LIBRARIES`.

    Raises:
        BundleError: the library or cuda-python is not installed, the plan was built for another GPU or version or cannot be
            loaded, or CUDA cannot be used.
    """

    def __init__(self, path: Path, component: Component) -> None:
        library = LIBRARIES[component.engine]
        check_plan(library, path)
        try:
            from diffuserve.engines.cuda import FirstGpu

            gpu = FirstGpu()
        except ImportError as error:
            raise BundleError(
                f"The engine {library.engine} needs cuda-python, which is not installed. Install it: {library.install}"
            ) from error
        except StageFailed as error:
            raise BundleError(f"{path} cannot run here. {error}") from error
        plan = Plan(library, path, component, gpu.stream)
        self._runner = PlanRunner(
            component.tensors, plan.profiles, plan.make_context, gpu, captures=not library.compiles_when_loaded
        )
        plan.keep_kernels()

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs the model; see `diffuserve.stages.Engine` and `PlanRunner`."""
        return self._runner(inputs)


class Plan:
    """A plan that is loaded.

    Args:
        library: that built it.
        path: the .plan file.
        component: the component.
        stream: where profiles are set.

    Raises:
        BundleError: the library is not installed or cannot load the plan, or it has other tensors.
    """

    def __init__(self, library: Library, path: Path, component: Component, stream: int) -> None:
        module = library.load()
        self._library, self._path, self._stream = library, path, stream
        self._logger = messages(module)
        self._logger.errors.clear()
        self._runtime = module.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise self._failure()
        tensors = component.tensors
        names = {self._engine.get_tensor_name(number) for number in range(self._engine.num_io_tensors)}
        expected = {spec.name for spec in (*tensors.inputs, *tensors.outputs)}
        if names != expected:
            raise BundleError(
                f"{path} has the tensors {sorted(names)}; expected: {sorted(expected)}. Build it again: diffuserve engines "
                f"BUNDLE --select {library.engine}"
            )
        self.profiles: list[Profile] = []
        for number in range(self._engine.num_optimization_profiles):
            shapes = {spec.name: self._engine.get_tensor_profile_shape(spec.name, number) for spec in tensors.inputs}
            self.profiles.append({name: ShapeRange(*map(tuple, ranges)) for name, ranges in shapes.items()})
        # A context gets no memory of its own: each would take as much as its profile's largest call needs.
        self._settings = module.ExecutionContextAllocationStrategy.USER_MANAGED
        self._kernels: CompiledKernels | None = None
        if library.compiles_when_loaded:
            cache = CompiledCache(path, component, library.version(), {})
            self._kernels = CompiledKernels(module, self._engine, self._settings, cache)
            self._settings = self._kernels.settings

    def make_context(self, number: int) -> Any:
        """An `IExecutionContext` of the profile of that number, which keeps the plan alive.

        Raises:
            BundleError: TensorRT refuses.
        """
        context = self._engine.create_execution_context(self._settings)
        if context is None or not context.set_optimization_profile_async(number, self._stream):
            raise self._failure()
        return context

    def keep_kernels(self) -> None:
        """Stores what was compiled for the contexts that were made, if anything was, for the next start."""
        if self._kernels is not None:
            self._kernels.store()

    def _failure(self) -> BundleError:
        return BundleError(
            f"{self._library.title} cannot load {self._path}: {'; '.join(self._logger.errors) or 'it does not say why'}"
        )
