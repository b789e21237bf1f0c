"""Plans built for other machines' GPUs, and tried on one of these; the library builds nothing, and ONNX Runtime runs it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from diffuserve.bundle.checksums import verify
from diffuserve.bundle.manifest import Component, Manifest, read_manifest, write_manifest
from diffuserve.engines import availability, tensorrt_plan
from diffuserve.engines.compiled_cache import CompiledCache
from diffuserve.engines.onnxruntime import OnnxRuntimeEngine
from diffuserve.engines.tensorrt_library import TENSORRT_RTX
from diffuserve.engines.tensorrt_plan import check_plan
from diffuserve.errors import BundleError
from diffuserve.limits import Limits
from diffuserve.stages import Engine
from diffuserve.tensors import UNET, VAE_DECODER, VAE_ENCODER
from diffuserve.trials import image_parity, selecting
from diffuserve.trials.ahead import build_ahead, untried
from diffuserve.trials.engines_command import command
from diffuserve.trials.selecting import select_engines
from tests.core.fake_tensorrt import fake_tensorrt
from tests.core.tiny_graphs import make_real_bundle

RTX = "tensorrt-rtx"


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_real_bundle(tmp_path)


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """TensorRT for RTX, installed on a machine without a GPU."""
    module = fake_tensorrt("tensorrt_rtx", "4.2", portable=True)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    see(monkeypatch)
    return module


def see(monkeypatch: pytest.MonkeyPatch, *architectures: str) -> None:
    """The GPUs that this machine has; TensorRT for RTX is installed."""
    for where in (tensorrt_plan, availability):
        monkeypatch.setattr(where, "gpu_architectures", lambda: architectures)
    versions = availability._version
    monkeypatch.setattr(
        availability, "_version", lambda name: "4.2" if name in (RTX, "cuda-python") else versions(name)
    )


def plans(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.plan"))


def test_the_manifest_says_what_was_built_and_nothing_of_trials(manifest: Manifest, tmp_path: Path) -> None:
    select_engines(tmp_path, "openvino")
    built = build_ahead(tmp_path, RTX, ("sm89", "sm86"))
    assert read_manifest(tmp_path) == built
    verify(tmp_path, built)
    assert {(part.engine, part.precision) for part in built.components.values()} == {(RTX, "fp16")}
    assert (built.trials, built.unet_seconds) == ((), {})
    assert [{*image.engines.values()} for image in built.images] == [{"onnxruntime fp32"}]
    for name, component in built.components.items():
        names = [Path(file.path).name for file in component.files]
        assert names == ["model.fp16.32x128x3.sm86-sm89.rtx4.2.plan", "model.fp16.onnx", "model.onnx"]
        assert component.plan_limits == {"max_rows": 32, "max_side_px": 128, "max_prompt_chunks": 3}
        assert component.tensors == manifest.components[name].tensors
    assert not list(tmp_path.rglob("*.openvino"))


def test_the_machine_that_serves_tries_these_plans(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build_ahead(tmp_path, RTX, ("sm86", "sm89"), "fp32", replace(Limits.for_model(manifest.model), max_rows=64))
    before = plans(tmp_path)
    ran: set[str] = set()

    def load(path: Path, component: Component, threads: int) -> Engine:
        if component.engine == RTX:
            check_plan(TENSORRT_RTX, path)
            ran.add(path.name)
        return OnnxRuntimeEngine(path.with_name("model.onnx"))

    monkeypatch.setattr(selecting, "load_engine", load)
    monkeypatch.setattr(image_parity, "load_engine", load)
    see(monkeypatch, "sm89")
    arguments = untried(built).partition("engines BUNDLE ")[2].split()
    assert arguments == ["--select", RTX, "--precision", "fp32", "--limit", "max_rows=64"]
    output = CliRunner().invoke(command, [str(tmp_path), *arguments], catch_exceptions=False).output
    assert "trying unet ..." in output
    assert "have not been tried" not in output
    selected = read_manifest(tmp_path)
    assert plans(tmp_path) == before
    assert ran == set(before)
    assert {trial.engine for trial in selected.trials} == {"onnxruntime", RTX}
    assert selected.components == built.components
    assert untried(selected) == ""


def test_a_component_that_overflows_takes_the_next_precision(manifest: Manifest, tmp_path: Path) -> None:
    components = {
        name: msgspec.structs.replace(component, overflows_in_fp16=name in (VAE_DECODER, VAE_ENCODER))
        for name, component in manifest.components.items()
    }
    overflowing = msgspec.structs.replace(manifest, components=components)
    write_manifest(tmp_path, overflowing)
    built = build_ahead(tmp_path, RTX, ("sm89",))
    assert {name: built.components[name].precision for name in (UNET, VAE_DECODER)} == {
        UNET: "fp16",
        VAE_DECODER: "bf16",
    }
    assert untried(built).endswith(f"--select {RTX}")
    back = select_engines(tmp_path, "onnxruntime")
    assert back.all_files() == manifest.all_files()
    assert not plans(tmp_path)
    with pytest.raises(BundleError, match=r"vae_decoder of .* does not run in fp16: it overflows in fp16, as the che"):
        build_ahead(tmp_path, RTX, ("sm89",), "fp16")
    assert read_manifest(tmp_path) == back


def test_kernels_of_earlier_plans_go_with_them(manifest: Manifest, tmp_path: Path) -> None:
    """Each is compiled of a plan, whose checksum names it."""

    def compiled() -> list[str]:
        return sorted(path.parent.name for path in tmp_path.rglob("*.tensorrt-rtx"))

    for architecture in ("sm86", "sm89"):
        component = build_ahead(tmp_path, RTX, (architecture,)).components[UNET]
        assert not compiled()
        path = tmp_path / component.files[0].path
        with CompiledCache(path, component, "4.2", {}).writing() as folder:
            assert folder
        assert compiled() == [UNET]
    build_ahead(tmp_path, RTX, ("sm89",))
    assert compiled() == [UNET]
    select_engines(tmp_path, "onnxruntime")
    assert not compiled()


def test_a_plan_that_cannot_be_built_changes_nothing(manifest: Manifest, tmp_path: Path, fake: Any) -> None:
    def fail(name: str) -> None:
        fake.refuses = "build" if name == UNET else ""

    files = sorted(tmp_path.rglob("*"))
    with pytest.raises(BundleError, match=r"TensorRT for RTX cannot build .*unet/model.fp16.onnx: reason 0"):
        build_ahead(tmp_path, RTX, ("sm89",), progress=fail)
    assert read_manifest(tmp_path) == manifest
    assert sorted(tmp_path.rglob("*")) == files


def test_the_command(manifest: Manifest, tmp_path: Path) -> None:
    runner = CliRunner()
    arguments = [str(tmp_path), "--select", RTX, "--architectures", "sm89,sm86"]
    output = runner.invoke(command, arguments, catch_exceptions=False).output
    assert "building unet ..." in output
    assert "trying" not in output
    last = (
        "The plans were built for GPUs of sm86, sm89, and have not been tried. On a machine with one: diffuserve engines BUNDLE "
        "--select tensorrt-rtx --precision fp16"
    )
    assert last in output.splitlines()
    assert last in runner.invoke(command, [str(tmp_path)], catch_exceptions=False).output.splitlines()
    assert runner.invoke(command, [str(tmp_path), "--architectures", "sm89"]).exit_code == 2
    assert runner.invoke(command, ["--architectures", "sm89"]).exit_code == 2


@pytest.mark.parametrize("engine", ["tensorrt", "onnxruntime", "auto", "abacus"])
def test_engines_that_are_not_built_ahead(manifest: Manifest, tmp_path: Path, engine: str) -> None:
    with pytest.raises(BundleError, match=f"{engine} takes no architectures, .* built ahead: tensorrt-rtx."):
        build_ahead(tmp_path, engine, ("sm89",))


def test_what_there_is_not(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"TensorRT for RTX does not run on 'sm90'. It runs on: sm75, sm80"):
        build_ahead(tmp_path, RTX, ("sm90",))
    with pytest.raises(BundleError, match="There is no engine tensorrt-rtx in int4"):
        build_ahead(tmp_path, RTX, ("sm89",), "int4")


def test_without_a_gpu_and_architectures(manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BundleError, match=r"no NVIDIA GPU can be seen .*--select tensorrt-rtx --architectures sm89"):
        select_engines(tmp_path, RTX)
    see(monkeypatch, "sm90")
    with pytest.raises(
        BundleError, match=r"TensorRT for RTX does not run on this GPU \(sm90\) \(use one of sm75, .*--arch"
    ):
        select_engines(tmp_path, RTX)
    assert read_manifest(tmp_path) == manifest
