"""Every phase, dry: on a CPU, with a small model."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch

from diffuserve.bundle.checksums import verify
from diffuserve.engines.example_inputs import example_inputs
from diffuserve.engines.gpu import gpu_architectures
from diffuserve.tensors import TEXT_ENCODER, UNET, VAE_DECODER, VAE_ENCODER
from diffuserve_bench.gpu import (
    ceilings,
    gpu_tests,
    images,
    loop,
    model,
    other_stages,
    pipelines,
    selection,
    torch_rows,
    unet_rows,
)
from diffuserve_bench.gpu.record import Skipped
from diffuserve_bench.gpu.settings import DRY, Settings
from diffuserve_bench.gpu.torch_models import random_unet
from diffuserve_bench.gpu.ways import Way, first_loaded, load, relative_error, ways
from diffuserve_bench.torch_unet import Tensors, TorchUnet
from tests.bench.gpu.conftest import Written
from tests.core.fakes import MODEL
from tests.core.torch_facade import TorchFacade

_ENGINE = {"engine": "onnxruntime", "precision": "fp32"}
_FIRST_ENGINE = {"engine": "torch", "precision": "fp32"}


def all_positive(written: Written) -> bool:
    values = [line["value"] for line in written.lines if line["kind"] == "figure"]
    return bool(values) and all(value is not None and value >= 0 for value in values)


def test_ceilings(settings: Settings, written: Written) -> None:
    ceilings.measure(settings, written.record)
    assert all_positive(written)
    for precision in ("bf16", "fp16"):
        for shape in (f"{DRY.matrix_side}x{DRY.matrix_side}x{DRY.matrix_side}", "64x320x2560"):
            assert len(written.values("matrix product", "TFLOP/s", precision=precision, shape=shape)) == 1
        assert len(written.values("convolution", "TFLOP/s", precision=precision)) == 1
    assert len(written.values("copy", "TB/s read and written")) == 1
    assert not written.parts


def test_the_model_is_made_once_and_its_operations_counted(settings: Settings, written: Written) -> None:
    model.measure(settings, written.record)
    # One convolution of 3 x 3 from 4 channels to 4, on latents of 6 x 8.
    [tera] = written.values("UNet", "TFLOP/row")
    assert tera * 1e12 == pytest.approx(2 * (4 * 6 * 8) * (4 * 3 * 3))
    bundle, manifest = model.model_in(settings)
    verify(bundle, manifest)
    made = {path: path.stat().st_mtime_ns for path in bundle.rglob("*.onnx")}
    model.measure(settings, written.record)
    assert {path: path.stat().st_mtime_ns for path in bundle.rglob("*.onnx")} == made
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


def test_nothing_is_measured_without_a_model(settings: Settings, written: Written) -> None:
    without = dataclasses.replace(settings, model=None, bundle=None)
    for phase in (model, unet_rows, loop, images, torch_rows, pipelines):
        with pytest.raises(Skipped, match="no model was named: --model FOLDER"):
            phase.measure(without, written.record)
    with pytest.raises(Skipped, match="no bundle was named"):
        selection.measure(without, written.record)


def test_a_copy_that_fails_leaves_nothing(settings: Settings, tmp_path: Path) -> None:
    assert settings.model is not None
    (settings.model / "unet" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(Exception, match="Error parsing"):
        model.model_in(settings)
    assert not list((settings.work / "model").iterdir())


def test_the_unet_by_rows(settings: Settings, written: Written) -> None:
    unet_rows.measure(settings, written.record)
    assert all_positive(written)
    assert not written.parts
    error = "largest error against fp32 on the CPU"
    for engine in (_ENGINE, _FIRST_ENGINE):
        for rows in DRY.rows:
            assert len(written.values("call", "ms/row", rows=rows, **engine)) == 1
            assert len(written.values("first call", "s", rows=rows, **engine)) == 1
        assert len(written.values("calls of random sizes, seen before", "ms/row", **engine)) == 1
    assert written.values(error, "of the output's deviation", **_ENGINE) == [0.0]
    assert written.values(error, "of the output's deviation", **_FIRST_ENGINE)[0] < 1e-4


def test_an_error_is_a_share_of_the_output_s_deviation() -> None:
    expected = {"x": np.array([1.0, -1.0, 3.0, -3.0], np.float32)}
    assert relative_error({"x": expected["x"] + np.float32(0.5)}, expected) == pytest.approx(0.5 / math.sqrt(5))
    assert math.isnan(relative_error({"x": np.full(4, np.nan, np.float32)}, expected))


def on_host(settings: Settings) -> Settings:
    """On an engine that takes arrays of the host only."""
    return dataclasses.replace(settings, ways=("onnxruntime:fp32",))


def test_the_loop_against_the_engine_and_against_whole_requests(settings: Settings, written: Written) -> None:
    loop.measure(on_host(settings), written.record)
    assert all_positive(written)
    assert not written.parts
    assert len(written.values("closed loop over the engine alone", "of its rows/s", arithmetic="host")) == 1
    assert len(written.values("closed loop over the engine alone", "of its rows/s")) == 1
    for batching in ("inflight srpt", "request", "none"):
        assert len(written.values("saturation", "images/s to latents", batching=batching, **_ENGINE)) == 1
        assert len(written.values("latency, mean", "s", batching=batching, load=0.8)) == 1
        [slowdown] = written.values("slowdown, p95", "of the time alone", batching=batching, load=0.8)
        assert slowdown > 0
    # A request after another makes calls of its own two rows.
    assert written.values("saturation", "rows/call", batching="none") == [2.0]
    assert written.values("saturation", "rows/call", batching="inflight srpt")[0] > 2


def test_the_loop_beside_an_engine_that_has_a_device(
    settings: Settings, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    way, engine = first_loaded(*model.model_in(settings), UNET, on_host(settings))
    facade = TorchFacade(engine)
    monkeypatch.setattr(loop, "first_loaded", lambda *arguments: (way, facade))
    loop.measure(settings, written.record)
    assert all_positive(written)
    assert not written.parts
    assert set(facade.kinds) == {True, False}
    assert facade.kinds[-1]  # the open loop, as a pipeline would run it
    for arithmetic in ("host", "device"):
        named = {"arithmetic": arithmetic, **_ENGINE}
        assert len(written.values("closed loop over the engine alone", "of its rows/s", **named)) == 1
        assert len(written.values("engine alone", "rows/s", rows=2, **named)) == 1


def test_pytorch_s_unet_makes_what_it_is_given(settings: Settings) -> None:
    bundle, manifest = model.model_in(settings)
    unet = TorchUnet(random_unet(bundle, torch.device("cpu"), torch.float32))
    arrays = example_inputs(manifest.components[UNET].tensors, manifest.model, 2)
    [of_arrays] = unet(arrays).values()
    [of_tensors] = unet({name: torch.from_numpy(array) for name, array in arrays.items()}).values()
    assert isinstance(of_tensors, torch.Tensor)
    np.testing.assert_array_equal(of_arrays, of_tensors.numpy())
    assert (of_arrays.dtype, of_arrays.shape) == (np.float32, arrays["sample"].shape)


def test_the_stages_around_the_unet(settings: Settings, written: Written) -> None:
    other_stages.measure(settings, written.record)
    assert all_positive(written)
    assert not written.parts
    for stage in (TEXT_ENCODER, VAE_DECODER, VAE_ENCODER):
        for batch in DRY.batches:
            assert len(written.values("call", "ms each", stage=stage, batch=batch, **_ENGINE)) == 1


def test_whole_requests(settings: Settings, written: Written) -> None:
    images.measure(settings, written.record)
    [images_per_s] = written.values("whole requests", "images/s to PNG", **_FIRST_ENGINE)
    assert images_per_s > 0


def test_pytorch_by_rows(settings: Settings, written: Written) -> None:
    torch_rows.measure(settings, written.record)
    assert all_positive(written)
    assert written.parts == ["a CPU has no CUDA graphs"]
    assert len(written.values("call", "ms/row", way="eager")) == len(DRY.rows)
    assert len(written.values("call", "ms/row", way="torch.compile")) == sum(rows > 1 for rows in DRY.rows)
    assert len(written.values("calls of random sizes", "ms/row", way="torch.compile")) == 1
    [error] = written.values("largest error against fp32 on the CPU", "of the output's deviation")
    assert error < 1e-3  # here it is the same, but for channels last


def test_the_pipeline_of_diffusers(settings: Settings, written: Written) -> None:
    pipelines.measure(settings, written.record)
    assert all_positive(written)
    assert written.parts == ["a CPU has no CUDA graphs"]
    for way in ("eager", "torch.compile"):
        assert len(written.values("pipeline", "images/s to latents", way=way)) == len(DRY.pipeline_batches)
        assert len(written.values("pipeline", "images/s to pixels", way=way)) == len(DRY.pipeline_batches)
    assert len(written.values("mixture, in batches of alike requests", "images/s to latents", way="eager")) == 1
    assert len(written.values("mixture, one at a time", "images/s to latents", way="torch.compile")) == 1


def test_a_graphed_unet_takes_what_the_pipeline_gives(settings: Settings) -> None:
    bundle, _ = model.model_in(settings)
    unet = random_unet(bundle, torch.device("cpu"), torch.float32)
    captured = []

    class Recorded:
        """Calls again what a graph would replay."""

        def __init__(self, call: Callable[[Tensors], torch.Tensor], example: Tensors) -> None:
            captured.append(len(example["sample"]))
            self._call = call

        def __call__(self, inputs: Tensors) -> torch.Tensor:
            return self._call(inputs)

    replay = pipelines.graphed(unet.forward, Recorded)
    generator = torch.Generator().manual_seed(1)
    for rows in (2, 4, 2):
        sample = torch.randn(rows, 4, 8, 8, generator=generator)
        text = torch.randn(rows, 12, MODEL.hidden_size, generator=generator)
        given = {"encoder_hidden_states": text, "timestep_cond": None, "added_cond_kwargs": None, "return_dict": False}
        with torch.no_grad():
            [expected] = unet(sample, torch.tensor(7), **given)
            [output] = replay(sample, torch.tensor(7), **given)
        assert torch.equal(output, expected)
    assert captured == [2, 4]


def test_a_model_without_configs_for_diffusers(settings: Settings, written: Written) -> None:
    assert settings.model is not None
    (settings.model / "unet" / "config.json").unlink()
    with pytest.raises(Skipped, match=r"has no config\.json; diffuserve export --without-weights writes it"):
        torch_rows.measure(settings, written.record)


def test_a_real_bundle_on_each_engine(settings: Settings, written: Written) -> None:
    assert settings.bundle is not None
    before = (settings.bundle / "manifest.json").read_bytes()
    selection.measure(settings, written.record)
    assert (settings.bundle / "manifest.json").read_bytes() == before
    assert not written.parts
    assert written.values("image, SSIM", "", drawn_by="onnxruntime fp32") == [1.0, 1.0]  # beside each engine
    for engine in (_ENGINE, _FIRST_ENGINE):
        assert len(written.values("call", "ms", stage=UNET, **engine)) >= 3


@pytest.mark.skipif(bool(gpu_architectures()), reason="this machine has a GPU")
def test_every_engine_for_gpus_says_what_it_lacks(settings: Settings, written: Written) -> None:
    on_gpu = dataclasses.replace(settings, device="cuda")
    assert {way.engine for way in ways(on_gpu)} >= {"torch-cuda", "onnxruntime-cuda", "tensorrt"}
    assert all(way.precision != "fp32" and way.lack for way in ways(on_gpu))
    unet_rows.measure(on_gpu, written.record)
    assert len(written.parts) == len(ways(on_gpu))
    assert all("no NVIDIA GPU can be seen" in reason for reason in written.parts)
    with pytest.raises(Skipped, match="sees no NVIDIA GPU"):
        ceilings.measure(on_gpu, written.record)
    with pytest.raises(Skipped, match=r"no engine loads the model\. torch-cuda fp16: .* And PyTorch: "):
        loop.measure(on_gpu, written.record)


def test_ways_that_are_asked_for(settings: Settings, tmp_path: Path) -> None:
    asked = dataclasses.replace(settings, ways=("openvino:fp32", "onnxruntime:fp32", "openvino:fp8"))
    assert Settings.from_json(asked.to_json()) == asked
    first, second, unknown = ways(asked)
    assert [(way.engine, way.precision, way.lack) for way in (first, second)] == [
        ("openvino", "fp32", ""),
        ("onnxruntime", "fp32", ""),
    ]
    assert unknown.lack.startswith("it is none of onnxruntime:fp32, ")


def test_only_a_dry_run_keeps_pytorch_from_compiling(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One engine must not decide how those after it run."""
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "0")
    manifest = SimpleNamespace(components={UNET: SimpleNamespace(files=[SimpleNamespace(path="model.onnx")])})
    monkeypatch.setattr("diffuserve_bench.gpu.ways.on_way", lambda *_: manifest.components[UNET])
    monkeypatch.setattr("diffuserve_bench.gpu.ways.load_engine", lambda *_, threads: "engine")
    [way] = ways(dataclasses.replace(settings, device="cuda", ways=("torch:fp32",)))
    load(tmp_path, manifest, UNET, way)  # type: ignore[arg-type]
    assert os.environ["TORCH_COMPILE_DISABLE"] == "0"
    ways(dataclasses.replace(settings, device="cpu"))
    assert os.environ["TORCH_COMPILE_DISABLE"] == "1"


def test_a_graph_in_fp16_is_made_once_and_runs(settings: Settings) -> None:
    bundle, manifest = model.model_in(settings)
    way = Way("onnxruntime", "fp16")
    engine = load(bundle, manifest, UNET, way)
    graph = bundle / UNET / "model.fp16.onnx"
    made = graph.stat().st_mtime_ns
    load(bundle, manifest, UNET, way)
    assert graph.stat().st_mtime_ns == made
    component = manifest.components[UNET]
    assert engine is not None
    overflowing = msgspec.structs.replace(component, overflows_in_fp16=True)
    changed = msgspec.structs.replace(manifest, components={**manifest.components, UNET: overflowing})
    with pytest.raises(Skipped, match="the unet overflows in fp16"):
        load(bundle, changed, UNET, way)


def test_tests_are_counted(settings: Settings, written: Written, tmp_path: Path) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    with pytest.raises(Skipped, match="has no tests that need a GPU"):
        gpu_tests.measure(dataclasses.replace(settings, tests=tests), written.record)
    (tests / "pytest.ini").write_text("[pytest]\nmarkers =\n  gpu: needs one\n  slow: takes minutes\n")
    (tests / "test_some.py").write_text(
        f"import pytest\npytestmark = {gpu_tests._MARKER}\n"
        "def test_a(): pass\n"
        "def test_b(): assert 1 == 2, 'one is not two'\n"
        "@pytest.mark.skipif(True, reason='not here')\ndef test_c(): pass\n"
        "@pytest.mark.slow\ndef test_for_minutes(): raise RuntimeError\n"
    )
    (tests / "test_others.py").write_text("def test_d(): raise RuntimeError\n")
    with pytest.raises(RuntimeError, match="tests failed"):
        gpu_tests.measure(dataclasses.replace(settings, tests=tests), written.record)
    assert [written.values("tests", outcome) for outcome in ("passed", "failed", "skipped")] == [[1], [1], [1]]
    assert written.parts[1] == "not here"
    assert "one is not two" in written.parts[0]
