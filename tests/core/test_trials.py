"""Choosing engines: by real measurements on small graphs, with the decision's rules on measurements of our own."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image

from diffuserve.bundle.checksums import describe_file, verify
from diffuserve.bundle.manifest import Component, Manifest, Trial, read_manifest, write_manifest
from diffuserve.engines import ENGINES, load_engine, processor
from diffuserve.engines.availability import Availability, availability
from diffuserve.engines.example_inputs import WARM_BATCHES, Arrays
from diffuserve.engines.gpu import gpu_architectures
from diffuserve.engines.local_stages import LocalStages
from diffuserve.engines.onnxruntime import OnnxRuntimeEngine
from diffuserve.errors import BundleError
from diffuserve.stages import Engine, StageCalls
from diffuserve.tensors import FINITE, SAFETY_CHECKER, TEXT_ENCODER, UNET, VAE_DECODER, VAE_ENCODER
from diffuserve.trials import image_parity, tolerance
from diffuserve.trials import selecting as trials
from diffuserve.trials.conversion import exported_files
from diffuserve.trials.engines_command import command
from diffuserve.trials.selecting import REFERENCE, fastest, first_allowed, select_engines, ways_to_try
from tests.core.tiny_graphs import STAGES, make_real_bundle


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_real_bundle(tmp_path)


def trial(engine: str, seconds: dict[int, float], rejected: str = "") -> Trial:
    return Trial(UNET, engine, "fp32", seconds, 0.0, 1.0, rejected)


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([], "onnxruntime"),
        ([{1: 0.5, 8: 6.0}], "other0"),
        ([{1: 0.99, 8: 7.9}], "onnxruntime"),  # a gain within the noise
        ([{1: 0.5, 8: 17.0}], "onnxruntime"),  # twice as fast alone, less than half as fast in a batch
        ([{1: 0.5, 8: 14.0}], "other0"),
        ([{1: 0.8, 8: 7.0}, {1: 0.7, 8: 7.0}, {1: 0.9, 8: 7.0}], "other1"),
    ],
)
def test_the_fastest_is_kept(others: list[dict[int, float]], expected: str) -> None:
    tried = [trial("onnxruntime", {1: 1.0, 8: 8.0})]
    tried += [trial(f"other{number}", seconds) for number, seconds in enumerate(others)]
    assert fastest(tried).engine == expected
    assert fastest([*tried, trial("wrong", {}, "it differs")]).engine == expected


def test_auto_tries_what_the_machine_has_and_says_so_in_the_manifest(manifest: Manifest, tmp_path: Path) -> None:
    ways = [(way.engine, way.precision) for way in availability() if way.usable]
    assert {"onnxruntime", "openvino", "torch"} <= {engine for engine, _ in ways}
    selected = select_engines(tmp_path, "auto")
    assert read_manifest(tmp_path) == selected
    for stage in STAGES:
        tried = [each for each in selected.trials if each.component == stage]
        assert [(each.engine, each.precision) for each in tried] == ways
        for each in tried:
            assert not each.rejected
            assert each.max_abs_error is not None
            assert each.max_abs_error <= each.tolerance
            assert set(each.seconds) == ({1, 2, 8} if stage == UNET else {1, 2})
            assert all(seconds > 0 for seconds in each.seconds.values())
        kept = fastest(tried)
        component = selected.components[stage]
        assert (component.engine, component.precision) == (kept.engine, kept.precision)
        assert exported_files(component) == manifest.components[stage].files


def test_a_named_engine_runs_all_components(manifest: Manifest, tmp_path: Path) -> None:
    sample = np.random.default_rng(0).standard_normal((3, 4, 6, 8)).astype(np.float32)

    def draw() -> list[np.ndarray]:
        async def main() -> list[np.ndarray]:
            calls = StageCalls(stages)
            text = await calls.encode_text({"input_ids": np.arange(36, dtype=np.int32).reshape(3, 12)})
            noise = await calls.denoise(sample, np.array([1, 500, 999], np.float32), text)
            return [noise, *await calls.decode(noise)]

        stages = LocalStages(tmp_path)
        try:
            return asyncio.run(main())
        finally:
            stages.close()

    expected = draw()
    selected = select_engines(tmp_path, "openvino")
    assert {(each.engine, each.precision) for each in selected.components.values()} == {("openvino", "fp32")}
    assert manifest.unet_seconds
    assert not selected.unet_seconds  # they were another engine's
    for actual, reference in zip(draw(), expected, strict=True):
        tolerance = 1 if reference.dtype == np.uint8 else 1e-5
        np.testing.assert_allclose(actual.astype(np.float64), reference, rtol=0, atol=tolerance)
    back = select_engines(tmp_path, "onnxruntime")
    assert {each.engine for each in back.components.values()} == {"onnxruntime"}
    assert not list(tmp_path.rglob("*.openvino"))


def test_an_engine_that_differs_too_much_is_not_taken(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tolerance, "RELATIVE_TOLERANCE", {"fp32": -1.0, "bf16": -1.0})
    with pytest.raises(BundleError, match=r"text_encoder of .* does not run on openvino in fp32: it differs by up to"):
        select_engines(tmp_path, "openvino")
    assert read_manifest(tmp_path) == manifest
    assert not list(tmp_path.rglob("*.openvino"))
    selected = select_engines(tmp_path, "auto", "fp32")
    assert selected.components[UNET].engine == "onnxruntime"
    [rejected] = [each for each in selected.trials if each.component == UNET and each.engine == "openvino"]
    assert "is allowed" in rejected.rejected
    assert not rejected.seconds


def test_an_engine_that_fails_is_not_taken(manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A component whose precision the engine refuses, as one made on another machine may be."""
    from diffuserve.engines import openvino

    monkeypatch.setattr(openvino, "PRECISION_HINTS", {"bf16": "bf16"})
    selected = select_engines(tmp_path, "auto", "fp32")
    assert {component.engine for component in selected.components.values()} == {"onnxruntime"}
    failed = [each for each in selected.trials if each.engine == "openvino"]
    assert len(failed) == len(STAGES)
    assert all(each.rejected.startswith("it fails: The engine openvino runs bf16") for each in failed)
    assert read_manifest(tmp_path) == selected


def test_what_cannot_run_here_is_refused_with_what_mends_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"There is no engine abacus. There are: onnxruntime in fp32, "):
        ways_to_try("abacus", None)
    with pytest.raises(BundleError, match=r"There is no engine openvino in int4. There are: "):
        ways_to_try("openvino", "int4")
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "none")
    with pytest.raises(BundleError, match=r"openvino in bf16 cannot run here: this processor .* \(use fp32, or"):
        ways_to_try("openvino", "bf16")
    assert ("openvino", "bf16") not in ways_to_try("auto", None)


@pytest.mark.skipif(bool(gpu_architectures()), reason="this machine has a GPU")
def test_without_a_gpu(manifest: Manifest, tmp_path: Path) -> None:
    for precision in ("fp16", "fp32"):
        with pytest.raises(
            BundleError, match=f"onnxruntime-cuda in {precision} cannot run here: no NVIDIA GPU can be seen"
        ):
            select_engines(tmp_path, "onnxruntime-cuda", precision)


# As on a machine with a GPU.
TENSORRT = [REFERENCE, ("tensorrt", "fp16"), ("tensorrt", "bf16"), ("tensorrt", "fp32")]


def test_a_component_that_overflows_takes_the_next_precision(manifest: Manifest) -> None:
    component = manifest.components[VAE_DECODER]
    overflowing = msgspec.structs.replace(component, overflows_in_fp16=True)
    assert first_allowed(TENSORRT, component) == [REFERENCE, ("tensorrt", "fp16")]
    assert first_allowed(TENSORRT, overflowing) == [REFERENCE, ("tensorrt", "bf16")]
    assert first_allowed([*TENSORRT[:2], TENSORRT[3]], overflowing) == [REFERENCE, ("tensorrt", "fp32")]
    # Asked for by name it is refused and not replaced.
    assert first_allowed(TENSORRT[:2], overflowing) == TENSORRT[:2]
    assert first_allowed([REFERENCE], overflowing) == [REFERENCE]


def test_a_component_that_overflows_is_not_run_in_fp16(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On engines that take fp16 in a world where this machine has a GPU: ONNX Runtime on the CPU stands for it."""
    components = {
        name: msgspec.structs.replace(component, overflows_in_fp16=name in (VAE_DECODER, VAE_ENCODER))
        for name, component in manifest.components.items()
    }
    write_manifest(tmp_path, msgspec.structs.replace(manifest, components=components))
    cuda = [Availability("onnxruntime-cuda", precision, "1", ()) for precision in ("fp16", "fp32")]
    monkeypatch.setattr(trials, "availability", lambda: (Availability(*REFERENCE, "1", ()), *cuda))
    loaded: list[tuple[str, str]] = []

    def load(path: Path, component: Component, threads: int) -> Engine:
        loaded.append((component.precision, path.name))
        return OnnxRuntimeEngine(path, threads=threads)

    monkeypatch.setattr(trials, "load_engine", load)
    monkeypatch.setattr(image_parity, "load_engine", load)
    selected = select_engines(tmp_path, "onnxruntime-cuda")
    assert {name: component.precision for name, component in selected.components.items()} == {
        TEXT_ENCODER: "fp16",
        UNET: "fp16",
        VAE_DECODER: "fp32",
        VAE_ENCODER: "fp32",
        SAFETY_CHECKER: "fp16",
    }
    assert {component.engine for component in selected.components.values()} == {"onnxruntime-cuda"}
    assert set(loaded) >= {("fp16", "model.fp16.onnx"), ("fp32", "model.onnx")}
    verify(tmp_path, selected)
    with pytest.raises(
        BundleError, match=r"vae_decoder of .* onnxruntime-cuda in fp16: it overflows in fp16, as the che"
    ):
        select_engines(tmp_path, "onnxruntime-cuda", "fp16")
    selected = select_engines(tmp_path, "auto")
    refused = {trial.component for trial in selected.trials if trial.rejected.startswith("it overflows in fp16")}
    assert refused == {VAE_DECODER, VAE_ENCODER}
    back = select_engines(tmp_path, "onnxruntime")
    assert back.all_files() == manifest.all_files()
    assert not list(tmp_path.rglob("*.fp16.onnx"))


class SmallestFirst:
    """An engine that is wrong for good if it is called first at a size below the native one, as OpenVINO has been."""

    def __init__(self, engine: Engine, native: tuple[int, ...]) -> None:
        self._engine, self._native = engine, native
        self._wrong: bool | None = None

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        if self._wrong is None:
            self._wrong = inputs["sample"].shape[2:] < self._native
        return {name: array + self._wrong for name, array in self._engine(inputs).items()}


def test_an_engine_is_tried_after_the_calls_that_a_server_begins_with(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factor = manifest.model.vae_scale_factor
    native = (manifest.model.height // factor, manifest.model.width // factor)

    def load(path: Path, component: Component, threads: int) -> Engine:
        engine = load_engine(path, component, threads)
        return SmallestFirst(engine, native) if component.engine == "openvino" and path.parent.name == UNET else engine

    monkeypatch.setattr(trials, "load_engine", load)
    with pytest.raises(BundleError, match=r"unet of .* does not run on openvino in fp32: it differs by up to 1"):
        select_engines(tmp_path, "openvino")


class Spoiling:
    """An engine that makes something not finite of the last row of each of its calls from number `after` on."""

    def __init__(self, engine: Engine, after: int = 0) -> None:
        self._engine = engine
        self._calls_to_go = after

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        outputs = self._engine(inputs)
        self._calls_to_go -= 1
        if self._calls_to_go < 0:
            for name, array in outputs.items():
                if name == FINITE or array.dtype == np.float32:
                    array[-1] = False if name == FINITE else np.nan
        return outputs


@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_whose_output_is_not_finite_is_not_taken(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """The bytes of an image are right, so that the decoder's word alone tells."""

    def load(path: Path, component: Component, threads: int) -> Engine:
        engine = load_engine(path, component, threads)
        return Spoiling(engine) if component.engine == "openvino" and path.parent.name == stage else engine

    monkeypatch.setattr(trials, "load_engine", load)
    with pytest.raises(BundleError, match=f"{stage} of .* does not run on openvino in fp32: its output is not finite"):
        select_engines(tmp_path, "openvino")
    assert read_manifest(tmp_path) == manifest
    selected = select_engines(tmp_path, "auto", "fp32")
    [rejected] = [each for each in selected.trials if each.rejected]
    assert (rejected.component, rejected.engine, rejected.rejected) == (stage, "openvino", "its output is not finite")
    assert (rejected.max_abs_error, rejected.seconds) == (None, {})
    assert selected.components[stage].engine == "onnxruntime"


def test_an_engine_whose_image_is_not_finite_is_not_taken(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It compares well on the trials' numbers, and overflows on those of a real image."""

    def load(path: Path, component: Component, threads: int) -> Engine:
        engine = load_engine(path, component, threads)
        return Spoiling(engine) if component.engine == "openvino" and path.parent.name == VAE_DECODER else engine

    monkeypatch.setattr(image_parity, "load_engine", load)
    with pytest.raises(
        BundleError, match=r"does not run on openvino in fp32: it draws no image: .* not finite for 1 of 1"
    ):
        select_engines(tmp_path, "openvino")
    assert read_manifest(tmp_path) == manifest
    selected = select_engines(tmp_path, "auto", "fp32")
    assert {component.engine for component in selected.components.values()} == {"onnxruntime"}
    assert {each.engine for each in selected.trials if each.rejected} == {"openvino"}


def test_a_bundle_whose_reference_is_not_finite(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        trials, "load_engine", lambda *args, **more: Spoiling(load_engine(*args, **more), after=len(WARM_BATCHES) + 3)
    )
    with pytest.raises(BundleError, match=r"unet of .* not finite on onnxruntime in fp32.* Export the checkpoint"):
        select_engines(tmp_path, "openvino")
    assert read_manifest(tmp_path) == manifest


@pytest.mark.gpu
@pytest.mark.skipif(not gpu_architectures(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_onnxruntime_on_a_gpu(manifest: Manifest, tmp_path: Path, precision: str) -> None:
    if any(not way.usable for way in availability() if (way.engine, way.precision) == ("onnxruntime-cuda", precision)):
        pytest.skip("see diffuserve engines for what is missing")
    selected = select_engines(tmp_path, "onnxruntime-cuda", precision)
    made = {"fp16": ["model.fp16.onnx"], "fp32": []}[precision]
    for component in selected.components.values():
        assert [Path(file.path).name for file in component.files] == [*made, "model.onnx"]
    verify(tmp_path, selected)
    back = select_engines(tmp_path, "onnxruntime")
    assert back.all_files() == manifest.all_files()
    assert not list(tmp_path.rglob("*.fp16.onnx"))


def test_an_image_is_drawn_by_each_engine(manifest: Manifest, tmp_path: Path) -> None:
    selected = select_engines(tmp_path, "openvino")
    assert [set(image.engines.values()) for image in selected.images] == [{"onnxruntime fp32"}, {"openvino fp32"}]
    reference, other = selected.images
    assert (reference.psnr_db, reference.ssim) == (None, 1.0)  # here it was drawn by the same graphs
    assert other.psnr_db is None or other.psnr_db > 50
    assert other.ssim > 0.999
    assert all(image.passed for image in selected.images)


def test_an_engine_that_draws_another_image_is_not_taken(manifest: Manifest, tmp_path: Path) -> None:
    image = Image.open(tmp_path / manifest.reference.file.path)
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / manifest.reference.file.path)
    drawn = describe_file(tmp_path, tmp_path / manifest.reference.file.path)
    files = tuple(drawn if file == manifest.reference.file else file for file in manifest.files)
    reference = msgspec.structs.replace(manifest.reference, file=drawn)
    spoilt = msgspec.structs.replace(manifest, files=files, reference=reference)
    write_manifest(tmp_path, spoilt)
    with pytest.raises(
        BundleError, match=r"does not run on openvino in fp32: it draws another image: PSNR \d+\.\d dB of 50 "
    ):
        select_engines(tmp_path, "openvino")
    assert read_manifest(tmp_path) == spoilt


def test_the_list_of_engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("model name : Abacus 3000\nflags : fpu\n")
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "cpuinfo")
    result = CliRunner().invoke(command, [], catch_exceptions=False)
    lines = result.output.splitlines()
    assert {line.split()[0] for line in lines if not line.startswith(" ")} == set(ENGINES)
    at = lines.index("openvino         bf16  cannot run")
    assert "this processor (Abacus 3000) has no bf16 arithmetic: use fp32" in lines[at + 1]
    assert any(line.startswith("onnxruntime      fp32  can run, version ") for line in lines)


def test_a_bundles_engines(manifest: Manifest, tmp_path: Path) -> None:
    runner = CliRunner()
    before = runner.invoke(command, [str(tmp_path)], catch_exceptions=False).output
    assert before.splitlines() == [f"{stage} runs on onnxruntime in fp32" for stage in STAGES]
    after = runner.invoke(command, [str(tmp_path), "--select", "openvino"], catch_exceptions=False).output
    assert "trying unet ..." in after
    assert "unet runs on openvino in fp32\n  onnxruntime      fp32  " in after
    assert runner.invoke(command, [str(tmp_path)], catch_exceptions=False).output in after
    assert runner.invoke(command, ["--select", "auto"]).exit_code == 2
    assert runner.invoke(command, [str(tmp_path), "--precision", "fp32"]).exit_code == 2


def test_a_trial_survives_the_manifest(tmp_path: Path) -> None:
    lost = Trial(UNET, "openvino", "bf16", {}, None, 0.5, "its output is not finite")
    assert msgspec.json.decode(msgspec.json.encode(lost), type=Trial) == lost
