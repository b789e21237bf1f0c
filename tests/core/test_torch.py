"""The engine torch on the CPU: compiled once and loaded afterwards, from several threads, with arrays and with tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import onnx
import pytest
import torch

from diffuserve.bundle.manifest import Component, Manifest
from diffuserve.engines import load_engine, torch_program
from diffuserve.engines.example_inputs import Arrays, example_inputs
from diffuserve.engines.torch import TorchEngine, cuda_unavailable
from diffuserve.errors import BundleError, StageFailed
from diffuserve.tensors import SAFETY_CHECKER, TEXT_ENCODER, UNET, VAE_DECODER
from tests.core.tiny_graphs import make_real_bundle

RNG = np.random.default_rng(5)


def on_torch(component: Component, precision: str = "fp32") -> Component:
    return msgspec.structs.replace(component, engine="torch", precision=precision)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("bundle")
    return folder, make_real_bundle(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def compiles(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PyTorch compiles, which the other tests do without; to code without vector instructions, since to find out which ones
    there are it compiles for as long again."""
    import torch._inductor.config

    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv("TORCH_COMPILE_DISABLE")
    with torch._inductor.config.patch({"cpp.vec_isa_ok": False}):
        yield


def unet_inputs(rows: int, height: int = 6, width: int = 8) -> Arrays:
    return {
        "sample": RNG.standard_normal((rows, 4, height, width), dtype=np.float32),
        "timestep": RNG.uniform(0, 999, (rows, 1)).astype(np.float32),
        "encoder_hidden_states": RNG.standard_normal((rows, 12, 5), dtype=np.float32),
    }


def load(made: tuple[Path, Manifest], stage: str = UNET, precision: str = "fp32") -> TorchEngine:
    folder, manifest = made
    engine = load_engine(folder / stage / "model.onnx", on_torch(manifest.components[stage], precision), threads=1)
    assert isinstance(engine, TorchEngine)
    return engine


def reference(made: tuple[Path, Manifest], stage: str = UNET) -> Callable[[Arrays], Arrays]:
    folder, manifest = made
    return load_engine(folder / stage / "model.onnx", manifest.components[stage], threads=1)


def refuse(*_: object) -> None:
    raise AssertionError("compiled again")


@pytest.fixture
def compiled(made: tuple[Path, Manifest], cache: Path, compiles: None, monkeypatch: pytest.MonkeyPatch) -> TorchEngine:
    """The UNet, compiled by whichever test asks first."""
    engine = load(made)
    assert len(list(cache.glob("diffuserve/native/*.torch"))) == 1
    monkeypatch.setattr(torch_program, "compile_package", refuse)
    return engine


def test_a_compiled_program(made: tuple[Path, Manifest], compiled: TorchEngine) -> None:
    for rows, height, width in ((1, 6, 8), (3, 6, 8), (2, 4, 12), (1, 2, 2), (9, 6, 8)):
        inputs = unet_inputs(rows, height, width)
        [actual], [expected] = compiled(inputs).values(), reference(made)(inputs).values()
        np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_the_second_start_loads_what_the_first_has_compiled(
    made: tuple[Path, Manifest], compiled: TorchEngine, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = unet_inputs(2)
    with caplog.at_level(logging.INFO):
        again = load(made)
    assert not caplog.records
    np.testing.assert_array_equal(again(inputs)["noise_pred"], compiled(inputs)["noise_pred"])


def test_the_package_is_private_and_holds_no_weights(
    made: tuple[Path, Manifest], compiled: TorchEngine, cache: Path
) -> None:
    assert (cache / "diffuserve" / "native").stat().st_mode & 0o777 == 0o700
    folder, _ = made
    assert not list(folder.rglob("*.torch"))
    [package] = cache.glob("diffuserve/native/*.torch/model.pt2")
    weights = np.ascontiguousarray(
        next(
            onnx_array
            for onnx_array in _weights(folder / UNET / "model.onnx")
            if onnx_array.size > 100  # the convolution's
        )
    )
    assert weights.tobytes()[:64] not in package.read_bytes()


def _weights(path: Path) -> Iterator[np.ndarray]:
    import onnx

    for tensor in onnx.load(path).graph.initializer:
        yield onnx.numpy_helper.to_array(tensor)


def test_what_is_stored_needs_no_compiler(
    made: tuple[Path, Manifest],
    compiled: TorchEngine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CXX", "no-compiler")
    inputs = unet_inputs(2)
    np.testing.assert_array_equal(load(made)(inputs)["noise_pred"], compiled(inputs)["noise_pred"])
    assert not caplog.records


def test_weights_are_held_once(made: tuple[Path, Manifest], compiled: TorchEngine, cache: Path) -> None:
    """A package reads the module's own: what is written there changes what it gives."""
    import onnx

    from diffuserve.torch_graphs.fusing import fuse_for_torch
    from diffuserve.torch_graphs.module import OnnxModule
    from diffuserve.torch_graphs.packages import Package

    path = made[0] / UNET / "model.onnx"
    model = onnx.load(path)
    fuse_for_torch(model)
    module = OnnxModule(model, path.parent, torch.device("cpu"))
    [file] = cache.glob("diffuserve/native/*.torch/model.pt2")
    package = Package(file, module)
    inputs = [torch.from_numpy(array) for array in unet_inputs(2).values()]
    with torch.no_grad():
        before = package(inputs)[0]
        for weight in module.buffers():
            weight.zero_()
        after = package(inputs)[0]
    assert before.std() > 0.1
    assert after.std(dim=(1, 2, 3)).max() < 1e-6


def test_a_damaged_package_is_made_again(
    made: tuple[Path, Manifest], compiled: TorchEngine, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [file] = cache.glob("diffuserve/native/*.torch/model.pt2")
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    compiled_again = []
    monkeypatch.setattr(
        torch_program, "compile_package", lambda _, path: compiled_again.append(path.write_bytes(whole))
    )
    inputs = unet_inputs(2)
    np.testing.assert_array_equal(load(made)(inputs)["noise_pred"], compiled(inputs)["noise_pred"])
    assert len(compiled_again) == 1
    assert [entry.read_bytes() == whole for entry in cache.glob("diffuserve/native/*.torch/model.pt2")] == [True]


@pytest.mark.parametrize("lack", ["no compiler", "it fails"])
def test_without_a_compiler_it_runs_and_says_so(
    made: tuple[Path, Manifest],
    lack: str,
    compiles: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(*_: object) -> None:
        raise RuntimeError(f"cc1plus: out of memory in {tmp_path}\nand much more")

    expected = f"PyTorch cannot compile .*model.onnx: cc1plus: out of memory in {tmp_path}$"
    if lack == "no compiler":
        monkeypatch.setenv("CXX", str(tmp_path / "g++"))
        monkeypatch.setattr(torch_program, "exported", fail)  # tracing would take time for nothing
        expected = (
            f"there is no C\\+\\+ compiler {tmp_path}/g\\+\\+. Install one .apt-get install g\\+\\+. or name another"
        )
    monkeypatch.setattr(torch_program, "compile_package", fail)
    inputs = unet_inputs(3)
    for _ in range(2):
        np.testing.assert_allclose(load(made)(inputs)["noise_pred"], reference(made)(inputs)["noise_pred"], atol=1e-5)
    [record] = [each for each in caplog.records if each.levelno == logging.WARNING]  # once
    assert record.getMessage().startswith("On cpu PyTorch runs without being compiled, which is slower: ")
    import re

    assert re.search(expected, record.getMessage())


@pytest.mark.parametrize("stage", [VAE_DECODER, SAFETY_CHECKER])
def test_images_and_scores(made: tuple[Path, Manifest], stage: str) -> None:
    _, manifest = made
    inputs = example_inputs(manifest.components[stage].tensors, manifest.model, 3)
    expected = reference(made, stage)(inputs)
    actual = load(made, stage)(inputs)
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (array.dtype, array.shape)
        np.testing.assert_allclose(actual[name].astype(np.float64), array, atol=1 if array.dtype == np.uint8 else 1e-4)


def test_calls_from_several_threads_do_not_mix(made: tuple[Path, Manifest]) -> None:
    engine, expected = load(made), reference(made)
    calls = [unet_inputs(1 + number % 5, 6 + 2 * (number % 3)) for number in range(30)]
    with ThreadPoolExecutor(6) as pool:
        outputs = list(pool.map(lambda inputs: engine(inputs)["noise_pred"], calls))
    for inputs, output in zip(calls, outputs, strict=True):
        np.testing.assert_allclose(output, expected(inputs)["noise_pred"], atol=1e-5)


def test_read_only_and_strided_inputs(made: tuple[Path, Manifest]) -> None:
    engine, inputs = load(made), unet_inputs(4)
    expected = engine({name: array[::2].copy() for name, array in inputs.items()})["noise_pred"]
    for array in inputs.values():
        array.flags.writeable = False
    np.testing.assert_array_equal(engine({name: array[::2] for name, array in inputs.items()})["noise_pred"], expected)


def test_tensors_are_taken_and_given(made: tuple[Path, Manifest]) -> None:
    engine, arrays = load(made), unet_inputs(3)
    assert engine.device == torch.device("cpu")
    outputs = engine({name: torch.from_numpy(array)[1:] for name, array in arrays.items()})
    assert isinstance(outputs["noise_pred"], torch.Tensor)
    assert not outputs["noise_pred"].is_inference()  # the caller may write to it
    expected = engine({name: array[1:] for name, array in arrays.items()})["noise_pred"]
    np.testing.assert_array_equal(outputs["noise_pred"].numpy(), expected)
    double = {
        **{name: torch.from_numpy(array) for name, array in arrays.items()},
        "sample": torch.zeros(3, 4, 6, 8).double(),
    }
    for wrong in (double, {**double, "sample": torch.zeros(3, 4, 6, 8, device="meta")}, {"sample": double["sample"]}):
        with pytest.raises(ValueError, match=r"expected: .*'sample': 'torch.float32 on cpu'"):
            engine(wrong)


def test_wrong_inputs_are_refused(made: tuple[Path, Manifest]) -> None:
    engine, inputs = load(made), unet_inputs(2)
    for wrong in (
        {name: array for name, array in inputs.items() if name != "timestep"},
        {**inputs, "timestep": inputs["timestep"].astype(np.float64)},
        {**inputs, "sample": inputs["sample"][:, :3]},
        {**inputs, "timestep": inputs["timestep"][:1]},
    ):
        with pytest.raises(ValueError, match="expected: "):
            engine(wrong)


@pytest.mark.parametrize("number", [-1, 2**31 - 1])
def test_a_number_that_the_table_has_no_row_for_is_refused(made: tuple[Path, Manifest], number: int) -> None:
    engine, ids = load(made, TEXT_ENCODER), np.zeros((2, 12), np.int32)
    engine({"input_ids": ids})
    ids[1, 3] = number
    with pytest.raises(ValueError, match=rf"input_ids has the number {number}; expected: 0 to \d+\."):
        engine({"input_ids": ids})


def test_a_call_whose_values_are_too_large_to_count_is_made_in_pieces(
    made: tuple[Path, Manifest], compiled: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest value of this UNet is its input's or output's, 192 numbers a row."""
    inputs = unet_inputs(7)
    expected, rows = compiled(inputs)["noise_pred"], []
    program = compiled._program
    call = program._call
    monkeypatch.setattr(program, "_call", lambda tensors: (rows.append(len(tensors[0])), call(tensors))[1])
    monkeypatch.setattr(torch_program, "MOST_ELEMENTS", 3 * 192 + 100)
    np.testing.assert_allclose(compiled(inputs)["noise_pred"], expected, atol=1e-6)
    assert rows == [3, 3, 1]


def test_a_row_whose_values_are_too_large_to_count_is_refused(
    made: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(made)
    engine._program._largest = 2.0
    monkeypatch.setattr(torch_program, "MOST_ELEMENTS", 2 * 192)
    assert len(engine(unet_inputs(2))["noise_pred"]) == 2
    with pytest.raises(
        ValueError, match=r"A row of shape \(4, 12, 8\) makes values of 768 numbers; .* at most 384\. Make"
    ):
        engine(unet_inputs(1, height=12))


def test_a_failure_is_the_stages(made: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(made)

    def full(_: object) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(engine._program, "_call", full)
    with pytest.raises(StageFailed, match=r"The memory of cpu is full: Tried .* --limit max_rows=N"):
        engine(unet_inputs(1))
    monkeypatch.setattr(engine._program, "_call", lambda _: torch.ones(2) @ torch.ones(3))
    with pytest.raises(StageFailed, match="PyTorch failed: "):
        engine(unet_inputs(1))


def test_what_it_cannot_run(made: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from diffuserve.engines import processor

    with pytest.raises(BundleError, match=r"engine torch runs fp32, bf16, and .* is in 'fp16'"):
        load(made, precision="fp16")
    (tmp_path / "cpuinfo").write_text("model name : Some Processor\nflags : avx2\n")
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "cpuinfo")
    with pytest.raises(BundleError, match=r"\(Some Processor\) has no bf16 arithmetic .*--select auto"):
        load(made, precision="bf16")
    _, manifest = made
    (tmp_path / "model.onnx").write_bytes(b"\x80\x04no graph")
    with pytest.raises(BundleError, match=r"model\.onnx is not an ONNX graph: .* Export the checkpoint again"):
        load_engine(tmp_path / "model.onnx", on_torch(manifest.components[UNET]), threads=1)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("node", r"damaged: it returns .*, which nothing makes\. Export the checkpoint again\."),
        ("initializer", r"damaged: \w+ takes .*, which nothing makes\. Export the checkpoint again\."),
        ("output", r"model\.onnx makes \[\] of .*; expected: \['noise_pred'\] of .*Export the checkpoint again\."),
        ("weights", r"cannot load .*model\.onnx: .*Export the checkpoint again, or .*--select auto"),
    ],
)
def test_a_damaged_graph(made: tuple[Path, Manifest], tmp_path: Path, field: str, message: str) -> None:
    folder, manifest = made
    model = onnx.load(folder / UNET / "model.onnx")
    if field == "weights":
        tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        tensor.raw_data = tensor.raw_data[:-1]
    else:
        model.graph.ClearField(field)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=message):
        load_engine(tmp_path / "model.onnx", on_torch(manifest.components[UNET]), threads=1)


def test_what_a_gpu_lacks() -> None:
    def library(cuda: str | None, available: bool) -> SimpleNamespace:
        return SimpleNamespace(
            __version__="2.13.0",
            version=SimpleNamespace(cuda=cuda),
            cuda=SimpleNamespace(is_available=lambda: available),
        )

    assert "was built without CUDA" in str(cuda_unavailable(library(None, False), ["sm90"]))
    assert "no NVIDIA GPU can be seen" in str(cuda_unavailable(library("13.0", False), []))
    assert "install a driver for CUDA 13.0" in str(cuda_unavailable(library("13.0", False), ["sm90"]))
    assert cuda_unavailable(library("13.0", True), ["sm90"]) is None
