"""The exported graphs against diffusers itself, at sizes that they were not traced with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from diffuserve.bundle.manifest import Manifest, read_manifest
from diffuserve.engines.onnxruntime import OnnxRuntimeEngine
from diffuserve.errors import CheckpointError
from diffuserve.tensors import NUMPY_DTYPE, STAGES, stage_specs
from diffuserve_export.quiet import hide_progress_bars, quiet


@pytest.fixture(scope="module")
def pipeline(shared_checkpoint: Path) -> Any:
    with quiet():
        from diffusers import StableDiffusionPipeline

        hide_progress_bars()
        return StableDiffusionPipeline.from_pretrained(shared_checkpoint, safety_checker=None, local_files_only=True)


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Manifest:
    return read_manifest(tiny_bundle)


def run(bundle: Path, stage: str, **inputs: NDArray[Any]) -> NDArray[Any]:
    """The first output."""
    return next(iter(OnnxRuntimeEngine(bundle / stage / "model.onnx")(inputs).values()))


def normal(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("stage", STAGES)
def test_graph_has_the_tensors_of_the_table(stage: str, tiny_bundle: Path, manifest: Manifest) -> None:
    import onnx

    spec = manifest.model
    table = stage_specs(max_tokens=spec.max_tokens, hidden_size=spec.hidden_size, latent_channels=spec.latent_channels)
    assert manifest.components[stage].tensors == table[stage]
    graph = onnx.load(tiny_bundle / stage / "model.onnx").graph
    for values, specs in ((graph.input, table[stage].inputs), (graph.output, table[stage].outputs)):
        assert [value.name for value in values] == [tensor.name for tensor in specs]
        for value, tensor in zip(values, specs, strict=True):
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            assert dtype == NUMPY_DTYPE[tensor.dtype]
            batch, *dims = [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim]
            assert batch == -1
            assert tuple(dims) == tensor.triton_dims


def test_graphs_carry_no_paths_of_this_machine(tiny_bundle: Path) -> None:
    for file in tiny_bundle.rglob("*"):
        if file.is_file():
            assert b"site-packages" not in file.read_bytes(), file
            assert str(Path.cwd()).encode() not in file.read_bytes(), file


@pytest.mark.parametrize("batch", [1, 3, 65])
def test_text_encoder(batch: int, tiny_bundle: Path, pipeline: Any) -> None:
    import torch

    input_ids = np.random.default_rng(0).integers(0, 512, (batch, 77), dtype=np.int32)
    with torch.inference_mode():
        expected = pipeline.text_encoder(torch.from_numpy(input_ids))[0].numpy()
    np.testing.assert_allclose(run(tiny_bundle, "text_encoder", input_ids=input_ids), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("batch", "height", "width", "tokens"), [(1, 8, 12, 77), (3, 2, 14, 77), (2, 10, 6, 231), (65, 4, 2, 77)]
)
def test_unet(batch: int, height: int, width: int, tokens: int, tiny_bundle: Path, pipeline: Any) -> None:
    import torch

    sample, hidden = normal(batch, 4, height, width), normal(batch, tokens, 32)
    timestep = np.linspace(999, 0, batch, dtype=np.float32)
    with torch.inference_mode():
        expected = [  # each row alone, with a scalar timestep, as diffusers calls it
            pipeline.unet(
                torch.from_numpy(sample[i : i + 1]), float(timestep[i]), torch.from_numpy(hidden[i : i + 1])
            ).sample
            for i in range(batch)
        ]
    actual = run(tiny_bundle, "unet", sample=sample, timestep=timestep[:, None], encoder_hidden_states=hidden)
    np.testing.assert_allclose(actual, torch.cat(expected).numpy(), atol=1e-4)


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 12), (3, 1, 5), (2, 11, 3)])
def test_decoded_images_are_those_of_the_pipeline(
    batch: int, height: int, width: int, tiny_bundle: Path, pipeline: Any
) -> None:
    import torch

    latents = normal(batch, 4, height, width)
    with torch.inference_mode():
        decoded = pipeline.vae.decode(torch.from_numpy(latents) / pipeline.vae.config.scaling_factor).sample
        images = pipeline.image_processor.postprocess(decoded, output_type="pil")
    expected = np.stack([np.asarray(image) for image in images]).astype(int)
    actual = run(tiny_bundle, "vae_decoder", latent_sample=latents)
    assert actual.dtype == np.uint8
    assert actual.shape == (batch, height * 8, width * 8, 3)
    assert expected.min() == 0  # clamped at both ends
    assert expected.max() == 255
    assert np.abs(actual - expected).max() <= 1


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 64, 96), (3, 8, 24), (2, 88, 16)])
def test_encoded_images_are_those_of_the_pipeline(
    batch: int, height: int, width: int, tiny_bundle: Path, pipeline: Any
) -> None:
    import torch
    from PIL import Image

    images = np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), dtype=np.uint8)
    with torch.inference_mode():
        pixels = pipeline.image_processor.preprocess([Image.fromarray(image) for image in images])
        expected = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
    np.testing.assert_allclose(run(tiny_bundle, "vae_encoder", image=images), expected.numpy(), atol=1e-4)


def test_parity_figures_are_within_tolerance(manifest: Manifest) -> None:
    assert_parity(manifest)


def test_parity_figures_of_the_bundled_checkpoint(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert_parity(manifest)
    assert manifest.model.default_guidance_scale == 4.0


def assert_parity(manifest: Manifest) -> None:
    assert set(manifest.components) == set(STAGES)
    for component in manifest.components.values():
        batches = {next(iter(record.shapes.values()))[0] for record in component.parity}
        assert batches == {1, 2, 5}
        for record in component.parity:
            assert 0 <= record.mean_abs_error <= record.max_abs_error <= component.tolerance
            assert record.output_std > 0
        image = component.tensors.outputs[0].dtype == "UINT8"
        assert component.tolerance <= (1 if image else 2e-3 * component.parity[0].output_std)


def test_a_wrong_export_is_refused(tiny_bundle: Path, shared_checkpoint: Path) -> None:
    import torch

    from diffuserve_export.checkpoint.checkpoint import open_checkpoint
    from diffuserve_export.checkpoint.load import model_from_checkpoint
    from diffuserve_export.graphs.modules import modules_from_model
    from diffuserve_export.parity import parity_of_onnx, references_of

    checkpoint = open_checkpoint(shared_checkpoint)
    model = model_from_checkpoint(checkpoint)
    modules = modules_from_model(model, checkpoint.spec)
    tensors = checkpoint.tensors["vae_encoder"]
    path = tiny_bundle / "vae_encoder" / "model.onnx"
    component = read_manifest(tiny_bundle).components["vae_encoder"]
    modules["vae_encoder"].scaling_factor = torch.tensor(1.01 * 0.5)
    references = references_of(modules["vae_encoder"], "vae_encoder", tensors, checkpoint.spec, {})
    with pytest.raises(CheckpointError, match=r"vae_encoder of tiny differs from PyTorch.*by up to 0.*allowed is"):
        parity_of_onnx(path, component, references, "vae_encoder of tiny")
    tolerance, records = parity_of_onnx(path, component, references, "vae_encoder of tiny", strict=False)
    assert max(record.max_abs_error for record in records) > tolerance


def test_preview_map_follows_the_colours(bundle: Path) -> None:
    """Left half red, right half blue: so says the preview of their latents."""
    image = np.zeros((1, 128, 128, 3), np.uint8)
    image[:, :, :64, 0] = image[:, :, 64:, 2] = 255
    latents = run(bundle, "vae_encoder", image=image)[0]
    preview = read_manifest(bundle).preview
    rgb = np.einsum("chw,cr->hwr", latents, np.array(preview.matrix)) + preview.bias
    middle = rgb.shape[1] // 2
    left, right = rgb[:, :middle].mean((0, 1)), rgb[:, middle:].mean((0, 1))
    assert left[0] > left[2]
    assert right[2] > right[0]
    assert 0 < preview.rmse < 0.2
