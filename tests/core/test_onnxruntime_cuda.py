"""ONNX Runtime on a GPU, as far as a CPU shows it: why there is none, and the memory that inputs and outputs lie in."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest

from diffuserve.bundle.manifest import Manifest
from diffuserve.engines import load_engine
from diffuserve.engines.bound_session import BoundSession, padded_rows
from diffuserve.engines.example_inputs import Arrays, example_inputs
from diffuserve.engines.gpu import free_memory_bytes, gpu_architectures
from diffuserve.engines.onnxruntime import CPU, OnnxRuntimeEngine, fused_session, session_options
from diffuserve.engines.onnxruntime_cuda import CUDA, cuda_options, cuda_unavailable
from diffuserve.engines.sessions_by_rows import SessionsByRows
from diffuserve.engines.unavailable import NO_GPU
from diffuserve.errors import BundleError
from diffuserve.tensors import TEXT_ENCODER, UNET, VAE_DECODER
from tests.core.tiny_graphs import STAGES, make_real_bundle


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_real_bundle(tmp_path)


class FakeRuntime:
    """What `cuda_unavailable` asks of the module onnxruntime. Its CUDA provider loads if nothing is `missing`, or if its libraries
    are found by `preload_dlls`."""

    __version__ = "1.99.0"

    def __init__(self, providers: Sequence[str], missing: Sequence[str] = (), found: bool = False) -> None:
        self._providers, self._missing, self._found = providers, missing, found
        self._loads = not missing
        self.sessions = 0

    def get_available_providers(self) -> Sequence[str]:
        return self._providers

    def preload_dlls(self) -> None:
        if self._found:
            self._loads = True
            return
        for name in self._missing:
            print(f"Failed to load {name}: {name}: cannot open shared object file: No such file or directory")
        print("Please follow https://onnxruntime.ai/docs/install/#cuda-and-cudnn to install CUDA.")

    def InferenceSession(self, graph: bytes, providers: Sequence[str]) -> Any:  # noqa: N802 - its own name
        assert onnxruntime.InferenceSession(graph, providers=[CPU]).run(None, {"x": np.ones(1, np.float32)}) == [-1]
        self.sessions += 1
        self._used = [each for each in providers if each in self._providers and (self._loads or each != CUDA)]
        return self

    def get_providers(self) -> list[str]:
        return self._used


GPU = ("sm90",)
LIBRARIES = ("libcublasLt.so.13", "libcurand.so.10")


def test_a_runtime_without_cuda() -> None:
    for architectures in ((), GPU):
        missing = cuda_unavailable(FakeRuntime([CPU]), architectures)
        assert missing is not None
        assert missing.reason == "onnxruntime 1.99.0 was built without CUDA"
        assert "onnxruntime-gpu" in missing.fix


def test_no_gpu() -> None:
    runtime = FakeRuntime([CUDA, CPU], LIBRARIES)
    assert cuda_unavailable(runtime, ()) is NO_GPU
    assert not runtime.sessions


def test_libraries_that_are_missing_are_named(capfd: pytest.CaptureFixture[str]) -> None:
    missing = cuda_unavailable(FakeRuntime([CUDA, CPU], LIBRARIES), GPU)
    assert missing is not None
    assert missing.reason == (
        "onnxruntime 1.99.0 was built with CUDA and cannot load it; missing: libcublasLt.so.13, libcurand.so.10"
    )
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in missing.fix
    assert capfd.readouterr().out == ""


def test_libraries_that_pip_has_installed_are_loaded_first() -> None:
    assert cuda_unavailable(FakeRuntime([CUDA, CPU], LIBRARIES, found=True), GPU) is None


def test_a_runtime_that_finds_its_libraries_itself() -> None:
    assert cuda_unavailable(FakeRuntime([CUDA, CPU]), GPU) is None


def test_the_runtime_that_is_installed() -> None:
    missing = cuda_unavailable(onnxruntime, gpu_architectures())
    assert (missing is None) == (CUDA in onnxruntime.get_available_providers() and bool(gpu_architectures()))


def test_fp32_is_not_tf32_and_fp16_may_use_tensor_cores() -> None:
    assert cuda_options("fp32")["use_tf32"] == "0"
    assert cuda_options("fp16")["use_tf32"] == "1"


@pytest.mark.skipif(bool(gpu_architectures()), reason="this machine has a GPU")
def test_a_component_without_a_gpu(manifest: Manifest, tmp_path: Path) -> None:
    component = msgspec.structs.replace(manifest.components[UNET], engine="onnxruntime-cuda")
    with pytest.raises(
        BundleError, match=r"model.onnx is to run on an NVIDIA GPU, which ONNX Runtime cannot do here: \w+"
    ):
        load_engine(tmp_path / UNET / "model.onnx", component, threads=1)


def bound(manifest: Manifest, folder: Path, stage: str) -> BoundSession:
    session = fused_session(folder / stage / "model.onnx", session_options(1), [CPU])
    return BoundSession(session, manifest.components[stage].tensors, "cpu")


def check(actual: Arrays, expected: Arrays) -> None:
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert (actual[name].shape, actual[name].dtype) == (array.shape, array.dtype)
        np.testing.assert_allclose(actual[name].astype(np.float64), array, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_any_batch_of_any_size(manifest: Manifest, tmp_path: Path, stage: str) -> None:
    tensors, model = manifest.components[stage].tensors, manifest.model
    run, reference = bound(manifest, tmp_path, stage), OnnxRuntimeEngine(tmp_path / stage / "model.onnx")
    taller = msgspec.structs.replace(model, height=model.height + model.size_multiple)
    for size in (model, taller):
        for rows in (1, 2, 3, 3, 5, 8, 2):
            inputs = example_inputs(tensors, size, rows)
            kept = {name: array.copy() for name, array in inputs.items()}
            check(run(inputs), reference(inputs))
            check(inputs, kept)


def test_rows_are_padded_to_powers_of_two() -> None:
    assert [padded_rows(rows) for rows in range(1, 10)] == [1, 2, 4, 4, 8, 8, 8, 8, 16]
    assert padded_rows(32) == 32


def test_memory_is_used_again_by_calls_of_as_many_rows(manifest: Manifest, tmp_path: Path) -> None:
    """The addresses are looked at in the binding: nothing else tells."""
    run = bound(manifest, tmp_path, UNET)
    tensors = manifest.components[UNET].tensors

    def addresses(rows: int) -> list[int]:
        run(example_inputs(tensors, manifest.model, rows))
        values = [*run._inputs.values(), *run._binding.get_outputs()]
        return [value.data_ptr() for value in values]

    first = addresses(3)
    assert addresses(4) == first
    assert addresses(3) == first
    assert len(set(first)) == 4
    assert run._inputs["sample"].shape()[0] == 4
    addresses(5)
    assert run._inputs["sample"].shape()[0] == 8


class Sessions:
    """Counts the sessions that were made, and which one a call goes to."""

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        self.made: list[BoundSession] = []
        self.called: list[int] = []
        self._manifest, self._folder = manifest, folder

    def make(self) -> Any:
        session, number = bound(self._manifest, self._folder, UNET), len(self.made)
        self.made.append(session)

        def call(inputs: Arrays) -> Arrays:
            self.called.append(number)
            return session(inputs)

        return call


def test_each_number_of_rows_has_a_session(manifest: Manifest, tmp_path: Path) -> None:
    sessions, reference = Sessions(manifest, tmp_path), OnnxRuntimeEngine(tmp_path / UNET / "model.onnx")
    run = SessionsByRows(sessions.make, lambda: True)
    assert len(sessions.made) == 1
    for rows in (2, 1, 8, 2, 7, 5, 1):
        inputs = example_inputs(manifest.components[UNET].tensors, manifest.model, rows)
        check(run(inputs), reference(inputs))
    assert sessions.called == [0, 1, 2, 0, 2, 2, 1]
    assert len(sessions.made) == 3


def test_without_memory_for_another_session_the_nearest_is_used(manifest: Manifest, tmp_path: Path) -> None:
    sessions, reference = Sessions(manifest, tmp_path), OnnxRuntimeEngine(tmp_path / UNET / "model.onnx")
    room = iter((True, False, False))
    run = SessionsByRows(sessions.make, lambda: next(room))
    for rows in (2, 16, 1, 12, 8, 2, 5):
        inputs = example_inputs(manifest.components[UNET].tensors, manifest.model, rows)
        check(run(inputs), reference(inputs))
    assert sessions.called == [0, 1, 0, 1, 0, 0, 0]
    assert len(sessions.made) == 2


def test_a_session_that_cannot_be_made_is_an_error_at_once() -> None:
    def make() -> BoundSession:
        raise RuntimeError("no such file")

    with pytest.raises(RuntimeError, match="no such file"):
        SessionsByRows(make, lambda: True)


def test_free_memory_without_a_gpu() -> None:
    assert (free_memory_bytes() > 0) == bool(gpu_architectures())


def test_an_earlier_calls_outputs_stay(manifest: Manifest, tmp_path: Path) -> None:
    run = bound(manifest, tmp_path, UNET)
    inputs = example_inputs(manifest.components[UNET].tensors, manifest.model, 2)
    (kept,) = run(inputs).values()
    before = kept.copy()
    run({name: array * 2 for name, array in inputs.items()})
    np.testing.assert_array_equal(kept, before)


def test_a_call_that_fails_leaves_the_next(manifest: Manifest, tmp_path: Path) -> None:
    run, reference = bound(manifest, tmp_path, UNET), OnnxRuntimeEngine(tmp_path / UNET / "model.onnx")
    inputs = example_inputs(manifest.components[UNET].tensors, manifest.model, 2)
    check(run(inputs), reference(inputs))
    for _ in range(2):
        with pytest.raises(Exception, match="Got invalid dimensions for input: sample"):
            run({**inputs, "sample": inputs["sample"][:, :3]})
        check(run(inputs), reference(inputs))


def test_wrong_inputs(manifest: Manifest, tmp_path: Path) -> None:
    run = bound(manifest, tmp_path, VAE_DECODER)
    latents = example_inputs(manifest.components[VAE_DECODER].tensors, manifest.model, 1)["latent_sample"]
    for inputs in ({"latent_sample": latents.astype(np.float64)}, {"latent": latents}, {}):
        with pytest.raises(ValueError, match=r"The inputs are .*; expected: latent_sample float32"):
            run(inputs)


def test_calls_from_several_threads(manifest: Manifest, tmp_path: Path) -> None:
    run, reference = bound(manifest, tmp_path, TEXT_ENCODER), OnnxRuntimeEngine(tmp_path / TEXT_ENCODER / "model.onnx")

    def call(seed: int) -> None:
        ids = np.random.default_rng(seed).integers(0, 256, (1 + seed % 5, 12)).astype(np.int32)
        check(run({"input_ids": ids}), reference({"input_ids": ids}))

    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(call, range(40)):
            pass
