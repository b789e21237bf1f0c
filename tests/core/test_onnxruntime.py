"""ONNX Runtime: attention as one operator, and a second start from the graph that the first has optimised."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest

from diffuserve.bundle.checksums import describe_file
from diffuserve.bundle.manifest import Component, Manifest, read_manifest
from diffuserve.engines import load_engine
from diffuserve.engines.example_inputs import example_inputs
from diffuserve.engines.onnxruntime import OnnxRuntimeEngine
from diffuserve.errors import BundleError
from diffuserve.graphs.fused_attention import fuse_attention
from diffuserve.tensors import STAGES, TEXT_ENCODER, UNET, VAE_DECODER
from tests.core.tiny_graphs import make_real_bundle


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return make_real_bundle(tmp_path / "bundle")


@pytest.fixture
def path(manifest: Manifest, tmp_path: Path) -> Path:
    return tmp_path / "bundle" / UNET / "model.onnx"


def stored(path: Path) -> list[Path]:
    return sorted(path.parent.glob("*.onnxruntime"))


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_the_second_start_needs_only_what_the_first_has_stored(manifest: Manifest, path: Path) -> None:
    component = manifest.components[UNET]
    inputs = example_inputs(component.tensors, manifest.model, 3)
    shutil.rmtree(stored(path)[0], ignore_errors=True)
    expected = load_engine(path, component, threads=1)(inputs)["noise_pred"]
    assert len(stored(path)) == 1
    assert not list(path.parent.glob(".*"))
    path.unlink()
    np.testing.assert_array_equal(load_engine(path, component, threads=2)(inputs)["noise_pred"], expected)
    shutil.rmtree(stored(path)[0])
    with pytest.raises(BundleError, match=f"ONNX Runtime cannot load {path}"):
        load_engine(path, component, threads=1)


@pytest.mark.parametrize("damage", [b"", b"no graph", None])
def test_a_damaged_stored_graph_is_made_again(manifest: Manifest, path: Path, damage: bytes | None) -> None:
    component = manifest.components[UNET]
    inputs = example_inputs(component.tensors, manifest.model, 1)
    expected = load_engine(path, component, threads=1)(inputs)["noise_pred"]
    [entry] = stored(path)
    graph = entry / "model.onnx"
    whole = graph.read_bytes()
    graph.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    np.testing.assert_array_equal(load_engine(path, component, threads=1)(inputs)["noise_pred"], expected)
    assert stored(path) == [entry]
    assert graph.stat().st_size == len(whole)


def test_weights_beside_the_graph(manifest: Manifest, path: Path) -> None:
    """As of models beyond 2 GB."""
    inputs = example_inputs(manifest.components[UNET].tensors, manifest.model, 2)
    expected = OnnxRuntimeEngine(path)(inputs)["noise_pred"]
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    files = tuple(describe_file(path.parents[1], each) for each in (path, path.with_name("model.onnx.data")))
    component = msgspec.structs.replace(manifest.components[UNET], files=files)
    for _ in range(2):
        np.testing.assert_array_equal(load_engine(path, component, threads=1)(inputs)["noise_pred"], expected)
    np.testing.assert_array_equal(OnnxRuntimeEngine(path)(inputs)["noise_pred"], expected)


def test_each_engine_keeps_its_own(manifest: Manifest, path: Path) -> None:
    onnxruntime_, openvino = (
        msgspec.structs.replace(manifest.components[UNET], engine=engine) for engine in ("onnxruntime", "openvino")
    )
    for component in (onnxruntime_, openvino, onnxruntime_):
        load_engine(path, component, threads=1)
    assert len(stored(path)) == 1
    assert len(list(path.parent.glob("*.openvino"))) == 1


def test_attention_of_the_bundled_unet_is_one_operator_each(bundle: Path, tmp_path: Path) -> None:
    component = read_manifest(bundle).components[UNET]
    source = bundle / component.files[0].path
    model = onnx.load(source)
    attentions = operators(model).count("Softmax")
    assert fuse_attention(model) == attentions > 0
    assert "Softmax" not in operators(model)
    assert operators(model).count("MultiHeadAttention") == attentions
    spelt_out = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    inputs = example_inputs(component.tensors, read_manifest(bundle).model, 2)
    [expected] = spelt_out.run(None, inputs)
    actual = OnnxRuntimeEngine(source)(inputs)["noise_pred"]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * expected.std())


@pytest.mark.parametrize("stage", [TEXT_ENCODER, UNET, VAE_DECODER])
def test_a_row_of_the_bundled_model_is_the_same_in_any_company(bundle: Path, stage: str) -> None:
    """To the bit: the sums of one row must not depend on how many there are."""
    manifest = read_manifest(bundle)
    component = manifest.components[stage]
    engine = OnnxRuntimeEngine(bundle / component.files[0].path)
    inputs = example_inputs(component.tensors, manifest.model, 5)
    alone = engine({name: array[:1] for name, array in inputs.items()})
    for rows in (2, 5):
        together = engine({name: array[:rows] for name, array in inputs.items()})
        for name, array in alone.items():
            np.testing.assert_array_equal(together[name][:1], array)


def test_attention_with_a_mask_is_left_alone(bundle: Path) -> None:
    model = onnx.load(bundle / read_manifest(bundle).components[TEXT_ENCODER].files[0].path)
    before = model.SerializeToString()
    assert "Softmax" in operators(model)
    assert fuse_attention(model) == 0
    assert model.SerializeToString() == before


@pytest.mark.parametrize("stage", STAGES)
def test_graphs_without_attention(manifest: Manifest, path: Path, stage: str) -> None:
    component: Component = manifest.components[stage]
    model = onnx.load(path.parents[1] / component.files[0].path)
    assert fuse_attention(model) == 0
