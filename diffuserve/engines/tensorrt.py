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
    from diffuserve.bundle import Component
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
        self._runner = PlanRunner(
            component.tensors, *contexts_of_plan(tensorrt, path, component.tensors, gpu.stream), gpu
        )

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs the model; see `diffuserve.stages.Engine` and `PlanRunner`."""
        return self._runner(inputs)


def contexts_of_plan(library: Any, path: Path, tensors: StageSpec, stream: int) -> tuple[list[Profile], list[Any]]:
    """Loads a plan.

    Args:
        library: the module `tensorrt`, or one with the same interface.
        path: the .plan file.
        tensors: the component's.
        stream: where profiles are set.

    Returns:
        The plan's profiles, and an `IExecutionContext` for each, which keeps the plan alive. Contexts get no memory of
        their own: each would take as much as its profile's largest call needs.

    Raises:
        BundleError: TensorRT cannot load the plan, or it has other tensors.
    """
    failure = f"TensorRT cannot load {path}; its own messages above say why."
    runtime = library.Runtime(library.Logger(library.Logger.WARNING))
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise BundleError(failure)
    names = {engine.get_tensor_name(number) for number in range(engine.num_io_tensors)}
    expected = {spec.name for spec in (*tensors.inputs, *tensors.outputs)}
    if names != expected:
        raise BundleError(
            f"{path} has the tensors {sorted(names)}; expected: {sorted(expected)}. Build it again: diffuserve engines "
            "BUNDLE --select tensorrt"
        )
    found: list[Profile] = []
    contexts = []
    for number in range(engine.num_optimization_profiles):
        shapes = {spec.name: engine.get_tensor_profile_shape(spec.name, number) for spec in tensors.inputs}
        found.append({name: ShapeRange(*map(tuple, ranges)) for name, ranges in shapes.items()})
        context = engine.create_execution_context(library.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None or not context.set_optimization_profile_async(number, stream):
            raise BundleError(failure)
        contexts.append(context)
    return found, contexts
