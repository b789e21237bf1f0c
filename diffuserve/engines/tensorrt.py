"""Components on TensorRT, in this process. It has never run, since no NVIDIA GPU was at hand; see docs/engines.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from diffuserve.engines.plan_runner import PlanRunner
from diffuserve.engines.tensorrt_plan import INSTALL, check_plan
from diffuserve.engines.tensorrt_profiles import Profile, ShapeRange
from diffuserve.errors import BundleError, StageFailed

if TYPE_CHECKING:
    from diffuserve.bundle.manifest import Component
    from diffuserve.tensors import StageSpec


class TensorRtEngine:
    """One plan on the first GPU. Calls from several threads run one after another.

    Args:
        path: the .plan file.
        component: what the manifest says of it.

    Raises:
        BundleError: tensorrt or cuda-python is not installed, the plan was built for another GPU or version or cannot be
            loaded, or CUDA cannot be used.
    """

    def __init__(self, path: Path, component: Component) -> None:
        check_plan(path)
        try:
            import tensorrt

            from diffuserve.engines.cuda import FirstGpu

            gpu = FirstGpu()
        except ImportError as error:
            raise BundleError(f"The engine tensorrt is not installed. Install it: {INSTALL}") from error
        except StageFailed as error:
            raise BundleError(f"{path} cannot run here. {error}") from error
        plan = Plan(tensorrt, path, component.tensors, gpu.stream)
        self._runner = PlanRunner(component.tensors, plan.profiles, plan.make_context, gpu)

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs the model; see `diffuserve.stages.Engine` and `PlanRunner`."""
        return self._runner(inputs)


class Plan:
    """A plan that is loaded.

    Args:
        library: the module `tensorrt`, or one with the same interface.
        path: the .plan file.
        tensors: the component's.
        stream: where profiles are set.

    Raises:
        BundleError: TensorRT cannot load the plan, or it has other tensors.
    """

    def __init__(self, library: Any, path: Path, tensors: StageSpec, stream: int) -> None:
        self._library, self._path, self._stream = library, path, stream
        self._runtime = library.Runtime(library.Logger(library.Logger.WARNING))
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise self._failure()
        names = {self._engine.get_tensor_name(number) for number in range(self._engine.num_io_tensors)}
        expected = {spec.name for spec in (*tensors.inputs, *tensors.outputs)}
        if names != expected:
            raise BundleError(
                f"{path} has the tensors {sorted(names)}; expected: {sorted(expected)}. Build it again: diffuserve engines "
                "BUNDLE --select tensorrt"
            )
        self.profiles: list[Profile] = []
        for number in range(self._engine.num_optimization_profiles):
            shapes = {spec.name: self._engine.get_tensor_profile_shape(spec.name, number) for spec in tensors.inputs}
            self.profiles.append({name: ShapeRange(*map(tuple, ranges)) for name, ranges in shapes.items()})

    def make_context(self, number: int) -> Any:
        """An `IExecutionContext` of the profile of that number, which keeps the plan alive. It gets no memory of its own: each
        would take as much as its profile's largest call needs.

        Raises:
            BundleError: TensorRT refuses.
        """
        context = self._engine.create_execution_context(self._library.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None or not context.set_optimization_profile_async(number, self._stream):
            raise self._failure()
        return context

    def _failure(self) -> BundleError:
        return BundleError(f"TensorRT cannot load {self._path}; its own messages above say why.")
