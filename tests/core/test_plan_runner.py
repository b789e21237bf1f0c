"""Calls of a TensorRT plan, with a GPU and a plan that are none: memory is numpy arrays, and what is asked of the stream is
done when it is waited for, in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from diffuserve.engines.cuda import Bytes
from diffuserve.engines.example_inputs import Arrays, example_inputs
from diffuserve.engines.plan_runner import PlanRunner
from diffuserve.engines.tensorrt_profiles import MOST_GRAPH_ROWS, Profile, profiles
from diffuserve.errors import StageFailed
from diffuserve.limits import Limits
from diffuserve.tensors import UNET, VAE_DECODER, StageSpec, TensorSpec, stage_specs
from tests.core.fakes import MODEL

# One output each, and of the decoder's, which may have more, the one that is bytes.
TENSORS = {
    UNET: stage_specs(max_tokens=12, hidden_size=5, latent_channels=4)[UNET],
    VAE_DECODER: StageSpec(
        (TensorSpec("latent_sample", "FP32", (4, "latent_height", "latent_width")),),
        (TensorSpec("image", "UINT8", ("height", "width", 3)),),
    ),
}
Work = list[Callable[[], None]]


class FakeGpu:
    """Implements `diffuserve.engines.cuda.Gpu`. `free_bytes`: how much may be taken on the GPU."""

    stream = 7

    def __init__(self, free_bytes: int = 1 << 30) -> None:
        self.memory: dict[int, Bytes] = {}
        self.host: dict[int, Bytes] = {}
        self.allocations = self.launches = self.captured = 0
        self.graphs: list[Work] = []
        self.free_bytes = free_bytes
        self.fails_to_capture = False
        self._queue: Work = []
        self._next = 4096

    def allocate(self, size_bytes: int) -> int:
        if size_bytes > self.free_bytes:
            raise StageFailed("CUDA failed: out of memory")
        self.free_bytes -= size_bytes
        self.allocations += 1
        self._next += 1 << 40
        self.memory[self._next] = np.full(size_bytes, 0xAB, np.uint8)
        return self._next

    def allocate_host(self, size_bytes: int) -> Bytes:
        self.allocations += 1
        array = np.full(size_bytes, 0xCD, np.uint8)
        self.host[array.ctypes.data] = array
        return array

    def free(self, address: int) -> None:
        if address in self.host:
            self.host.pop(address)
        else:
            self.free_bytes += len(self.memory.pop(address))

    def to_gpu(self, address: int, source: Bytes) -> None:
        self.enqueue(lambda: self.write(address, source))

    def to_host(self, target: Bytes, address: int) -> None:
        def copy() -> None:
            target[:] = self.memory[address][: len(target)]

        self.enqueue(copy)

    def synchronize(self) -> None:
        work, self._queue = self._queue, []
        for do in work:
            do()

    def capture(self, enqueue: Callable[[], None]) -> Work:
        assert not self._queue  # a capture must not wait for what came before
        try:
            enqueue()
        finally:
            graph, self._queue = self._queue, []
        if self.fails_to_capture:
            raise StageFailed("CUDA failed: operation not permitted when stream is capturing")
        self.captured += 1
        self.graphs.append(graph)
        return graph

    def launch(self, graph: Work) -> None:
        assert any(graph is each for each in self.graphs)
        self.launches += 1
        self._queue += graph

    def discard(self, graph: Work) -> None:
        self.graphs = [each for each in self.graphs if each is not graph]

    def enqueue(self, do: Callable[[], None]) -> None:
        self._queue.append(do)

    def write(self, address: int, source: Bytes) -> None:
        self.memory[address][: len(source)] = source

    def read(self, address: int, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.memory[address][:size].view(dtype).reshape(shape)


def answer(stage: str, inputs: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """What the plan computes, row by row."""
    if stage == VAE_DECODER:
        latents = inputs["latent_sample"][:, :3].repeat(8, axis=2).repeat(8, axis=3)
        return (latents.transpose(0, 2, 3, 1) * 40 + 120).clip(0, 255).astype(np.uint8)
    text = inputs["encoder_hidden_states"].mean(axis=(1, 2))
    row = text + inputs["timestep"][:, 0] / 1000
    return (inputs["sample"] * 2 + row[:, None, None, None]).astype(np.float32)


@dataclass
class FakeProfile:
    """A plan's profile, whose contexts refuse what `refuses` names; `executed`: how often they were."""

    ranges: Profile
    refuses: str = ""
    executed: int = 0


class FakeContext:
    """Implements `diffuserve.engines.plan_runner.PlanContext`. A graph that was captured from it is of no use any more once it
    is told anything else."""

    def __init__(self, gpu: FakeGpu, stage: str, profile: FakeProfile) -> None:
        self.gpu, self.stage, self.profile = gpu, stage, profile
        self._told = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._workspace = (0, 0)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._told += 1
        self._shapes[name] = shape
        return self.profile.refuses != "shape" and self.profile.ranges[name].allows(shape)

    def get_tensor_shape(self, name: str) -> list[int]:
        if self.profile.refuses == "output":
            return [-1, 4, 6, 8]
        inputs = {name: np.zeros(shape, np.float32) for name, shape in self._shapes.items()}
        return list(answer(self.stage, inputs).shape)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._told += 1
        self._addresses[name] = memory
        return self.profile.refuses != "address"

    def update_device_memory_size_for_shapes(self) -> int:
        return 3 * int(np.prod(next(iter(self._shapes.values()))))

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self.update_device_memory_size_for_shapes()
        self._told += 1
        self._workspace = (memory, size)

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle == self.gpu.stream
        if self.profile.refuses == "call":
            return False
        self.profile.executed += 1
        told = self._told
        shapes, addresses, workspace = dict(self._shapes), dict(self._addresses), self._workspace
        output = next(name for name in addresses if name not in shapes)

        def compute() -> None:
            assert told == self._told, "the context has been told something else since"
            self.gpu.memory[workspace[0]][: workspace[1]] = 0xEF
            inputs = {name: self.gpu.read(addresses[name], shape, "float32") for name, shape in shapes.items()}
            self.gpu.write(addresses[output], answer(self.stage, inputs).ravel().view(np.uint8))

        self.gpu.enqueue(compute)
        return True


class Plan:
    """A runner, and what it runs on."""

    def __init__(self, stage: str = UNET, gpu: FakeGpu | None = None) -> None:
        self.stage, self.gpu = stage, gpu or FakeGpu()
        self.ranges = profiles(TENSORS[stage], MODEL, Limits.for_model(MODEL))
        self.profiles = [FakeProfile(ranges) for ranges in self.ranges]
        self.run = PlanRunner(TENSORS[stage], self.ranges, self._make_context, self.gpu)

    def _make_context(self, number: int) -> FakeContext:
        return FakeContext(self.gpu, self.stage, self.profiles[number])

    def check(self, inputs: Arrays) -> None:
        (actual,) = self.run(inputs).values()
        np.testing.assert_array_equal(actual, answer(self.stage, inputs))

    @property
    def executed(self) -> list[int]:
        return [profile.executed for profile in self.profiles]


def random_inputs(rows: int, seed: int = 0, *, stage: str = UNET, side: int = 0, tokens: int = 12) -> Arrays:
    """At the native size, or with latents of `side` by `side`."""
    rng = np.random.default_rng(seed)
    latents = rng.standard_normal((rows, 4, side or 6, side or 8), dtype=np.float32)
    if stage == VAE_DECODER:
        return {"latent_sample": latents}
    return {
        "sample": latents,
        "timestep": rng.uniform(0, 1000, (rows, 1)).astype(np.float32),
        "encoder_hidden_states": rng.standard_normal((rows, tokens, 5), dtype=np.float32),
    }


@pytest.mark.parametrize("stage", [UNET, VAE_DECODER])
def test_every_number_of_rows_runs_in_the_smallest_profile(stage: str) -> None:
    plan = Plan(stage)
    most = {UNET: 32, VAE_DECODER: 8}[stage]
    for rows in range(1, most + 1):
        before = plan.executed
        plan.check(random_inputs(rows, rows, stage=stage))
        ran = [number for number, (old, new) in enumerate(zip(before, plan.executed, strict=True)) if new > old]
        assert ran == [0 if rows <= 2 else 1 if rows <= 8 else 2]


@pytest.mark.parametrize("tokens", [12, 24, 36])
@pytest.mark.parametrize("side", [2, 7, 16])
def test_other_sizes_and_longer_prompts_run_in_pieces(tokens: int, side: int) -> None:
    plan = Plan()
    (rows,) = {ranges.max[0] for ranges in plan.ranges[-1].values()}
    assert rows < 20
    plan.check(random_inputs(20, side=side, tokens=tokens))
    assert plan.executed == [0, 0, 0, -(-20 // rows)]
    assert not plan.gpu.captured


def test_more_rows_than_any_profile_run_in_pieces() -> None:
    plan = Plan()
    plan.check(random_inputs(70))
    assert plan.executed == [0, 0, 3, 0]


def test_a_shape_of_few_rows_is_launched_as_a_graph_from_its_second_call_on() -> None:
    plan = Plan()
    for rows in range(1, 33):
        plan.check(random_inputs(rows, 100))
    executed = plan.executed
    for seed in range(3):
        for rows in (3, 1, MOST_GRAPH_ROWS, MOST_GRAPH_ROWS + 1, 2, 32):
            plan.check(random_inputs(rows, seed))
    # Memory grew while the batches did, and took the graphs with it; each shape was captured again at its next call.
    assert plan.gpu.launches == 3 * 4 - 4
    assert [new - old for old, new in zip(executed, plan.executed, strict=True)] == [2 * 2, 2 * 2, 3 * 2, 0]


def test_memory_is_taken_once() -> None:
    plan = Plan()
    plan.check(random_inputs(32))
    allocations = plan.gpu.allocations
    for seed in range(3):
        for rows in (32, 1, 5):
            plan.check(random_inputs(rows, seed))
    assert plan.gpu.allocations == allocations
    assert len(plan.gpu.memory) == 5  # four tensors, and what is computed in between
    assert len(plan.gpu.host) == 4


def test_no_graph_outlives_its_memory() -> None:
    """The fake raises KeyError for memory that was given back."""
    plan = Plan()
    for rows in (2, 2, 8, 2, 8, 32, 2, 8, 2):
        plan.check(random_inputs(rows, rows))
    plan.check(random_inputs(8, side=16, tokens=36))
    plan.check(random_inputs(2, 5))


def test_too_little_memory_for_one_call_leaves_the_others() -> None:
    plan = Plan(gpu=FakeGpu(free_bytes=40_000))
    for _ in range(2):
        plan.check(random_inputs(2, 1))
        with pytest.raises(StageFailed, match="out of memory"):
            plan.run(random_inputs(32))
    plan.check(random_inputs(2, 2))
    plan.check(random_inputs(2, 3))


@pytest.mark.parametrize(
    ("refuses", "message"),
    [
        ("shape", r"TensorRT refuses the shape \(3, 4, 6, 8\) of sample"),
        ("address", "TensorRT refuses the address of sample"),
        ("call", "TensorRT refuses the call"),
        ("output", r"TensorRT does not know the shapes of {'noise_pred': \(-1, 4, 6, 8\)} for inputs"),
    ],
)
def test_what_tensorrt_refuses_fails_that_call_alone(refuses: str, message: str) -> None:
    plan = Plan()
    plan.profiles[1].refuses = refuses
    with pytest.raises(StageFailed, match=message):
        plan.run(random_inputs(3))
    plan.check(random_inputs(2))
    plan.profiles[1].refuses = ""
    plan.check(random_inputs(3))


def test_a_plan_that_cannot_be_captured_runs_without_graphs(caplog: pytest.LogCaptureFixture) -> None:
    plan = Plan()
    plan.gpu.fails_to_capture = True
    for seed in range(3):
        plan.check(random_inputs(2, seed))
        plan.check(random_inputs(1, seed))
    assert plan.gpu.launches == 0
    assert [record.getMessage() for record in caplog.records] == [
        "going on without CUDA graphs: CUDA failed: operation not permitted when stream is capturing"
    ]


def test_an_earlier_calls_outputs_stay() -> None:
    plan = Plan()
    inputs = random_inputs(2, 1)
    (kept,) = plan.run(inputs).values()
    for seed in range(2, 5):
        plan.check(random_inputs(2, seed))
    np.testing.assert_array_equal(kept, answer(UNET, inputs))


def test_arrays_that_lie_otherwise_in_memory() -> None:
    inputs = random_inputs(4)
    inputs["sample"] = np.asfortranarray(inputs["sample"])
    inputs["timestep"] = inputs["timestep"].repeat(2, axis=0)[::2]
    Plan().check(inputs)


def test_calls_from_several_threads() -> None:
    plan = Plan()
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda seed: plan.check(random_inputs(1 + seed % 5, seed)), range(40)):
            pass


def test_wrong_inputs() -> None:
    plan = Plan()
    inputs = example_inputs(TENSORS[UNET], MODEL, 2)
    with pytest.raises(
        ValueError, match="The inputs are encoder_hidden_states float32, sample float64, timestep float32"
    ):
        plan.run({**inputs, "sample": inputs["sample"].astype(np.float64)})
    with pytest.raises(
        ValueError, match=r"The inputs are sample float32; expected: encoder_hidden_states float32, sam"
    ):
        plan.run({"sample": inputs["sample"]})
    with pytest.raises(ValueError, match="The inputs have different numbers of rows"):
        plan.run({**inputs, "sample": inputs["sample"][:1]})
    with pytest.raises(StageFailed, match="The plan was not built for inputs of the shapes"):
        plan.run(random_inputs(2, side=17))
    plan.check(inputs)
