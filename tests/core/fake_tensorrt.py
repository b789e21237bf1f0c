"""A library with as much of TensorRT's interface as diffuserve uses, which builds and loads plans that hold nothing."""

from __future__ import annotations

import enum
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

Shape = tuple[int, ...]


class Severity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3


class ComputeCapability(enum.Enum):
    SM86 = 86
    SM89 = 89


class _Config:
    """`IBuilderConfig`; of TensorRT for RTX if it is portable. What is asked of the other kind of library is not there."""

    def __init__(self, portable: bool) -> None:
        self.flags_cleared: list[str] = []
        self.profiles: list[dict[str, tuple[Shape, Shape, Shape]]] = []
        self.progress_monitor: Any = None
        if portable:
            self.num_compute_capabilities = 0
            self.capabilities: dict[int, ComputeCapability] = {}
            self.set_compute_capability = self._set_compute_capability
        else:
            self.timings = b""
            self.create_timing_cache = _Bytes
            self.set_timing_cache = self._set_timing_cache
            self.get_timing_cache = lambda: _Bytes(self.timings + b"+")

    def clear_flag(self, flag: str) -> None:
        self.flags_cleared.append(flag)

    def add_optimization_profile(self, profile: _Profile) -> int:
        if any(
            not low <= best <= high
            for shapes in profile.shapes.values()
            for low, best, high in zip(*shapes, strict=True)
        ):
            return -1
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1

    def _set_compute_capability(self, capability: ComputeCapability, index: int) -> bool:
        self.capabilities[index] = capability
        return index < self.num_compute_capabilities

    def _set_timing_cache(self, cache: _Bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.timings = cache.data
        return cache.data != b"of another driver"


class _Bytes:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Shape, Shape, Shape]] = {}

    def set_shape(self, name: str, least: Shape, best: Shape, most: Shape) -> None:
        self.shapes[name] = (least, best, most)


class _Cache:
    """`IRuntimeCache` on a card."""

    def __init__(self, card: str) -> None:
        self._card, self._kernels = card, 0

    def compile(self) -> None:
        self._kernels += 1

    def serialize(self) -> bytes:
        return json.dumps([self._card, self._kernels]).encode()

    def deserialize(self, blob: bytes) -> bool:
        card, kernels = json.loads(blob)
        if card != self._card:
            return False
        self._kernels = kernels
        return True


class _RuntimeConfig:
    def __init__(self, card: str) -> None:
        self._card = card
        self.strategy = self.cuda_graph_strategy = ""
        self.cache: _Cache | None = None

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> _Cache:
        return _Cache(self._card)

    def set_runtime_cache(self, cache: _Cache) -> bool:
        self.cache = cache
        return True


class _Engine:
    """`ICudaEngine` of a plan: JSON of its tensors and profiles. `contexts`: what each was made with."""

    def __init__(self, plan: bytes, card: str, portable: bool) -> None:
        content = json.loads(plan)
        self._tensors, self._profiles = content["tensors"], content["profiles"]
        self.num_io_tensors, self.num_optimization_profiles = len(self._tensors), len(self._profiles)
        self.contexts: list[Any] = []
        if portable:
            self.create_runtime_config = lambda: _RuntimeConfig(card)

    def get_tensor_name(self, number: int) -> str:
        name: str = self._tensors[number]
        return name

    def get_tensor_profile_shape(self, name: str, number: int) -> Sequence[Shape]:
        shapes: Sequence[Shape] = self._profiles[number][name]
        return shapes

    def create_execution_context(self, settings: Any) -> _Context:
        self.contexts.append(settings)
        if isinstance(settings, _RuntimeConfig) and settings.cache:
            settings.cache.compile()
        return _Context()


class _Context:
    def set_optimization_profile_async(self, number: int, stream: int) -> bool:
        return number >= 0


def fake_tensorrt(name: str, version: str, *, portable: bool) -> Any:
    """A module.

    Its `refuses` names what goes wrong: "graph", "build" or "plan"; its `card` is the GPU that compiles kernels; `configs` and
    `engines` are what it has made.

    Args:
        name: of the module.
        version: its own.
        portable: whether it is like TensorRT for RTX.
    """
    fake: Any = ModuleType(name)
    fake.__version__ = version
    fake.refuses, fake.card = "", "RTX 4090"
    fake.configs, fake.engines = [], []

    class ILogger:
        pass

    ILogger.Severity = Severity  # type: ignore[attr-defined]

    class Builder:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def create_network(self, flags: int) -> Any:
            return object()

        def create_builder_config(self) -> _Config:
            fake.configs.append(_Config(portable))
            return fake.configs[-1]

        def create_optimization_profile(self) -> _Profile:
            return _Profile()

        def build_serialized_network(self, network: Any, config: _Config) -> bytes | None:
            self._logger.log(Severity.INFO, "building")
            if fake.refuses == "build":
                for number in range(9):
                    self._logger.log(Severity.ERROR, f"reason {number}")
                return None
            config.progress_monitor.phase_start("building", None, 1)
            config.progress_monitor.phase_finish("building")
            runs_on = [each.name for each in config.capabilities.values()] if portable else []
            plan = {"tensors": [*config.profiles[0]], "profiles": config.profiles, "runs_on": runs_on}
            return json.dumps(plan).encode()

    class OnnxParser:
        num_errors = 1

        def __init__(self, network: Any, logger: Any) -> None: ...

        def parse_from_file(self, path: str) -> bool:
            assert Path(path).is_file()
            return bool(fake.refuses != "graph")

        def get_error(self, number: int) -> str:
            return "In node 3 (abacus): UNSUPPORTED_NODE"

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> _Engine | None:
            if fake.refuses == "plan":
                self._logger.log(Severity.INTERNAL_ERROR, "the plan is damaged")
                return None
            fake.engines.append(_Engine(plan, fake.card, portable))
            return fake.engines[-1]

    class IProgressMonitor:
        pass

    fake.ILogger, fake.IProgressMonitor = ILogger, IProgressMonitor
    fake.Builder, fake.OnnxParser, fake.Runtime = Builder, OnnxParser, Runtime
    fake.NetworkDefinitionCreationFlag = object()
    fake.BuilderFlag = enum.Enum("BuilderFlag", ["TF32"])
    fake.ExecutionContextAllocationStrategy = enum.Enum("ExecutionContextAllocationStrategy", ["USER_MANAGED"])
    if portable:
        fake.ComputeCapability = ComputeCapability
        fake.CudaGraphStrategy = enum.Enum("CudaGraphStrategy", ["WHOLE_GRAPH_CAPTURE"])
    return fake
