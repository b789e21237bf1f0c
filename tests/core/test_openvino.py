"""OpenVINO runs what ONNX Runtime runs, from several threads, and starts again from what it has compiled."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest

from diffuserve.bundle.manifest import Component, Manifest, read_manifest
from diffuserve.engines import load_engine, processor
from diffuserve.engines.compiled_cache import cache_folders
from diffuserve.engines.example_inputs import Arrays, example_inputs
from diffuserve.errors import BundleError
from diffuserve.tensors import FINITE, UNET, VAE_DECODER
from tests.core.tiny_graphs import STAGES, make_real_bundle

RNG = np.random.default_rng(3)


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return make_real_bundle(tmp_path / "bundle")


@pytest.fixture
def folder(manifest: Manifest, tmp_path: Path) -> Path:
    return tmp_path / "bundle"


def on_openvino(component: Component, precision: str = "fp32") -> Component:
    return msgspec.structs.replace(component, engine="openvino", precision=precision)


def unet_inputs(rows: int, height: int = 6, width: int = 8) -> Arrays:
    return {
        "sample": RNG.standard_normal((rows, 4, height, width), dtype=np.float32),
        "timestep": RNG.uniform(0, 999, (rows, 1)).astype(np.float32),
        "encoder_hidden_states": RNG.standard_normal((rows, 12, 5), dtype=np.float32),
    }


def cached(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.openvino"))


@pytest.mark.parametrize("stage", STAGES)
def test_it_gives_what_onnxruntime_gives(manifest: Manifest, folder: Path, stage: str) -> None:
    component, path = manifest.components[stage], folder / stage / "model.onnx"
    theirs, ours = load_engine(path, component, threads=1), load_engine(path, on_openvino(component), threads=1)
    for batch, height in ((1, 48), (3, 48), (2, 96), (3, 48)):
        model = msgspec.structs.replace(manifest.model, height=height)
        inputs = example_inputs(component.tensors, model, batch, {})
        expected, actual = theirs(inputs), ours(inputs)
        assert actual.keys() == expected.keys() == {spec.name for spec in component.tensors.outputs}
        for name, array in expected.items():
            assert (actual[name].dtype, actual[name].shape) == (array.dtype, array.shape)
            assert array.std() > 0.1 or name == FINITE
            tolerance = 1 if array.dtype == np.uint8 else 1e-5
            np.testing.assert_allclose(actual[name].astype(np.float64), array, rtol=0, atol=tolerance)


@pytest.mark.parametrize("smallest_first", [True, False])
def test_what_was_called_before_does_not_matter(bundle: Path, smallest_first: bool, tmp_path: Path) -> None:
    """On the bundled UNet: a server warms its engines at the smallest size, where some kernels are others."""
    manifest = read_manifest(bundle)
    component, model, path = manifest.components[UNET], manifest.model, tmp_path / UNET / "model.onnx"
    shutil.copytree(bundle / UNET, path.parent)
    ours, theirs = load_engine(path, on_openvino(component), 0), load_engine(path, component, 0)
    sizes = [(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 3), (1, 4, 4), (5, 4, 4), (1, 1, 1), (3, 1, 2)]
    for rows, height, width in sizes if smallest_first else reversed(sizes):
        sized = msgspec.structs.replace(model, height=height * model.size_multiple, width=width * model.size_multiple)
        inputs = example_inputs(component.tensors, sized, rows)
        [expected], [actual] = theirs(inputs).values(), ours(inputs).values()
        np.testing.assert_allclose(actual, expected, atol=1e-3, err_msg=f"{rows} rows of {height} x {width}")


def test_calls_from_several_threads_do_not_mix(manifest: Manifest, folder: Path) -> None:
    path = folder / UNET / "model.onnx"
    engine = load_engine(path, on_openvino(manifest.components[UNET]), threads=1)
    reference = load_engine(path, manifest.components[UNET], threads=1)
    calls = [unet_inputs(1 + number % 5, 6 + 2 * (number % 3)) for number in range(60)]
    with ThreadPoolExecutor(6) as pool:
        outputs = list(pool.map(lambda inputs: engine(inputs)["noise_pred"], calls))
    for inputs, output in zip(calls, outputs, strict=True):  # all kept until the end: none may lie in a shared buffer
        np.testing.assert_allclose(output, reference(inputs)["noise_pred"], atol=1e-5)


def test_read_only_and_strided_inputs(manifest: Manifest, folder: Path) -> None:
    path = folder / UNET / "model.onnx"
    engine = load_engine(path, on_openvino(manifest.components[UNET]), threads=1)
    inputs = unet_inputs(4)
    expected = engine({name: array[::2].copy() for name, array in inputs.items()})["noise_pred"]
    for array in inputs.values():
        array.flags.writeable = False
    before = {name: array.copy() for name, array in inputs.items()}
    actual = engine({name: array[::2] for name, array in inputs.items()})["noise_pred"]
    np.testing.assert_array_equal(actual, expected)
    for name, array in inputs.items():
        np.testing.assert_array_equal(array, before[name])


def test_wrong_inputs_are_refused_instead_of_converted(manifest: Manifest, folder: Path) -> None:
    engine = load_engine(folder / UNET / "model.onnx", on_openvino(manifest.components[UNET]), threads=1)
    inputs = unet_inputs(2)
    engine(inputs)
    for wrong in (
        {name: array for name, array in inputs.items() if name != "timestep"},
        {**inputs, "timestep": inputs["timestep"].astype(np.float64)},
        {**inputs, "colour": inputs["timestep"]},
    ):
        with pytest.raises(
            ValueError, match="expected: encoder_hidden_states float32, sample float32, timestep float32"
        ):
            engine(wrong)
    with pytest.raises(RuntimeError):
        engine({**inputs, "sample": inputs["sample"][:, :3]})
    assert engine(inputs)["noise_pred"].shape == (2, 4, 6, 8)


def test_the_second_start_needs_only_what_the_first_has_compiled(manifest: Manifest, folder: Path) -> None:
    component, path = on_openvino(manifest.components[UNET]), folder / UNET / "model.onnx"
    inputs = unet_inputs(2)
    expected = load_engine(path, component, threads=1)(inputs)["noise_pred"]
    assert len(cached(path.parent)) == 1
    path.unlink()
    np.testing.assert_array_equal(load_engine(path, component, threads=1)(inputs)["noise_pred"], expected)
    with pytest.raises(BundleError, match=f"OpenVINO cannot load {path}"):  # other threads, so compiled anew
        load_engine(path, component, threads=2)


@pytest.mark.parametrize("damage", [b"", b"no compiled model", None])
def test_a_damaged_compiled_model_is_made_again(manifest: Manifest, folder: Path, damage: bytes | None) -> None:
    component, path = on_openvino(manifest.components[UNET]), folder / UNET / "model.onnx"
    inputs = unet_inputs(2)
    expected = load_engine(path, component, threads=1)(inputs)["noise_pred"]
    [entry] = cached(path.parent)
    file = entry / "model.blob"
    file.chmod(0o600)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    np.testing.assert_array_equal(load_engine(path, component, threads=1)(inputs)["noise_pred"], expected)
    assert cached(path.parent) == [entry]
    assert len(file.read_bytes()) == len(whole)


def refuse_in(refused: Path, mkdtemp: Callable[..., str], *, dir: Path, **names: str) -> str:
    """A folder that nothing can be written to; root, as which tests may run, could write to any."""
    if dir == refused:
        raise PermissionError(f"{dir} is read-only")
    return mkdtemp(dir=dir, **names)


def test_where_the_models_folder_cannot_be_written_the_users_is_taken(
    manifest: Manifest, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    component, path = on_openvino(manifest.components[UNET]), folder / UNET / "model.onnx"
    load_engine(path, component, threads=1)
    [entry] = cached(path.parent)
    shutil.rmtree(entry)
    monkeypatch.setattr(tempfile, "mkdtemp", partial(refuse_in, path.parent, tempfile.mkdtemp))
    load_engine(path, component, threads=1)
    beside, users = cache_folders(path, "openvino")
    assert beside == path.parent
    assert not cached(beside)
    assert [found.name for found in cached(users)] == [entry.name]
    path.unlink()
    load_engine(path, component, threads=1)


def test_what_another_version_of_the_files_has_compiled_is_not_taken(manifest: Manifest, folder: Path) -> None:
    component, path = on_openvino(manifest.components[UNET]), folder / UNET / "model.onnx"
    load_engine(path, component, threads=1)
    load_engine(path, component, threads=2)
    assert len(cached(path.parent)) == 1  # the older one is gone
    changed = msgspec.structs.replace(component.files[0], sha256="0" * 64)
    path.unlink()
    with pytest.raises(BundleError, match="cannot load"):
        load_engine(path, msgspec.structs.replace(component, files=(changed,)), threads=2)


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "cpuinfo"
    path.write_text("processor : 0\nmodel name : Some Processor\nflags : fpu avx2 avx512f\n\nprocessor : 1\n")
    monkeypatch.setattr(processor, "_CPUINFO", path)
    yield path


def test_bf16_is_refused_where_the_processor_would_emulate_it(manifest: Manifest, folder: Path, cpuinfo: Path) -> None:
    component = on_openvino(manifest.components[VAE_DECODER], "bf16")
    with pytest.raises(BundleError, match=r"\(Some Processor\) has no bf16 arithmetic .*--select auto"):
        load_engine(folder / VAE_DECODER / "model.onnx", component, threads=1)
    for flag in ("avx512_bf16", "amx_bf16"):
        cpuinfo.write_text(f"model name : Another\nflags : fpu {flag}\n")
        assert processor.computes_bf16()
    cpuinfo.unlink()
    assert not processor.computes_bf16()


def test_an_unknown_precision_is_refused(manifest: Manifest, folder: Path) -> None:
    with pytest.raises(BundleError, match="runs fp32 and bf16 on a CPU, and the component asks for 'int4'"):
        load_engine(folder / UNET / "model.onnx", on_openvino(manifest.components[UNET], "int4"), threads=1)
