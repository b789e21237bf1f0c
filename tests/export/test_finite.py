"""What makes values that are not finite is not exported, whichever component it is; and no image of one colour is a
reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffuserve.bundle.manifest import read_manifest
from diffuserve.errors import CheckpointError
from diffuserve.tensors import SAFETY_CHECKER, TEXT_ENCODER, UNET, VAE_DECODER, VAE_ENCODER
from diffuserve_export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from diffuserve_export.checkpoint.load import model_from_checkpoint
from diffuserve_export.checkpoint.loaded_model import LoadedModel
from diffuserve_export.export import bundle_from_checkpoint
from diffuserve_export.graphs.modules import modules_from_model
from diffuserve_export.parity import parity_of_onnx, random_input_ids, references_of
from diffuserve_export.preview import preview_from_vae_encoder
from diffuserve_export.reference_image import FILE_NAME, reference_from_model
from tests.export.tiny import add_safety_checker, component_of, write_checkpoint, write_sdxl_checkpoint

# By stage: a weight that all of its output depends on, as the message names it in a comparison and in the pipeline.
WEIGHTS = {
    TEXT_ENCODER: "text_encoder.{}encoder.layers.0.mlp.fc1.weight",
    UNET: "unet.conv_in.weight",
    VAE_DECODER: "vae.decoder.conv_in.weight",
    VAE_ENCODER: "vae.encoder.conv_in.weight",
    SAFETY_CHECKER: "safety_checker.visual_projection.weight",
}


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with all components, the safety checker too."""
    images = np.random.default_rng(0).integers(0, 256, (4, 48, 64, 3), dtype=np.uint8)
    return add_safety_checker(write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny"), [*images])


@pytest.fixture
def loaded(checked: Path) -> tuple[Checkpoint, LoadedModel]:
    checkpoint = open_checkpoint(checked, steps=2)
    return checkpoint, model_from_checkpoint(checkpoint)


def weight_of(model: LoadedModel, stage: str) -> tuple[str, Any]:
    """Its name, and the tensor."""
    part, _, name = WEIGHTS[stage].partition(".")
    # Since transformers 5.6 CLIPTextModel has its parts itself, before in `text_model`.
    inner = "" if hasattr(model.text_encoder, "encoder") else "text_model."
    name = name.format(inner)
    return f"{part}.{name}", getattr(model, part).get_parameter(name)


def nan(weight: Any) -> None:
    weight.view(-1)[3] = np.nan


def infinity(weight: Any) -> None:
    weight.view(-1)[5] = -np.inf


def huge(weight: Any) -> None:
    """Finite, and what is multiplied with it is not."""
    weight.copy_(weight / weight.abs().max() * 3e38)


plants = pytest.mark.parametrize("plant", [nan, infinity, huge])


def cause(plant: Callable[[Any], None], name: str) -> str:
    return (
        rf"weights are finite \(the largest is 3e\+38, in .*{name}\), so values on the way are too large for fp32"
        if plant is huge
        else rf"1 of its weights hold such values, .*{name} is one: the file is damaged"
    )


@plants
@pytest.mark.parametrize("stage", WEIGHTS)
def test_no_comparison_passes(loaded: tuple[Checkpoint, LoadedModel], stage: str, plant: Callable[[Any], None]) -> None:
    checkpoint, model = loaded
    name, weight = weight_of(model, stage)
    texts = random_input_ids(tuple(model.tokenizers.values()), checkpoint.tensors[TEXT_ENCODER])
    modules = modules_from_model(model, checkpoint.spec)

    def references(of: str) -> Any:
        encoded = texts if of == TEXT_ENCODER else references(TEXT_ENCODER)[-1].outputs
        return references_of(modules[of], of, checkpoint.tensors[of], checkpoint.spec, encoded)

    plant(weight)
    with pytest.raises(CheckpointError, match=f"The {stage} of tiny makes values that are not finite") as caught:
        references(stage)
    assert caught.match(cause(plant, name))
    if stage == VAE_ENCODER:
        with pytest.raises(CheckpointError, match=f"The {stage} of tiny makes values that are not finite"):
            preview_from_vae_encoder(modules[stage], checkpoint.spec)


@plants
@pytest.mark.parametrize("stage", [TEXT_ENCODER, UNET, VAE_DECODER])
def test_no_reference_image_is_drawn(
    loaded: tuple[Checkpoint, LoadedModel], tmp_path: Path, stage: str, plant: Callable[[Any], None]
) -> None:
    """It is drawn before anything is compared, and what comes out of diffusers' pipeline is black in all cases."""
    checkpoint, model = loaded
    name, weight = weight_of(model, stage)
    plant(weight)
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=f"The {stage} of tiny makes values that are not finite") as caught:
            reference_from_model(checkpoint, model, tmp_path, strict=strict)
        assert caught.match(cause(plant, name))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "pooled"])
def test_either_text_encoder_of_xl(tmp_path: Path, part: str) -> None:
    checkpoint = open_checkpoint(write_sdxl_checkpoint(tmp_path / "xl"), steps=2)
    model = model_from_checkpoint(checkpoint)
    assert model.text_encoder_2 is not None
    if part == "pooled":  # which the hidden states do not depend on
        huge(model.text_encoder_2.text_projection.weight)
        model.text_encoder_2.text_projection.weight *= 10
    else:
        nan(getattr(model, part).get_input_embeddings().weight[-1])
    with pytest.raises(CheckpointError, match=f"The {TEXT_ENCODER} of xl makes values that are not finite"):
        reference_from_model(checkpoint, model, tmp_path)


def test_a_vae_that_overflows_makes_no_bundle(checkpoint: Path, tmp_path: Path) -> None:
    """And leaves none, whatever is allowed."""
    from safetensors.numpy import load_file, save_file

    path = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["decoder.conv_out.weight"] = np.full_like(tensors["decoder.conv_out.weight"], 1e38)
    save_file(tensors, path, metadata={"format": "pt"})
    for strict in (True, False):
        with pytest.raises(
            CheckpointError, match=r"The vae_decoder of tiny .*the largest is 1e\+38, in vae.decoder.conv_out.weight"
        ):
            bundle_from_checkpoint(checkpoint, tmp_path / "bundle", strict=strict)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_graph_that_makes_what_pytorch_does_not(loaded: tuple[Checkpoint, LoadedModel], tmp_path: Path) -> None:
    """The decoder's graph, of which everything is right but one number."""
    import onnx

    from diffuserve_export.graphs.onnx import onnx_from_module

    checkpoint, model = loaded
    tensors, module = checkpoint.tensors[VAE_DECODER], modules_from_model(model, checkpoint.spec)[VAE_DECODER]
    path = tmp_path / "model.onnx"
    onnx_from_module(module, VAE_DECODER, tensors, checkpoint.spec, path)
    graph = onnx.load(path)
    [bias] = [tensor for tensor in graph.graph.initializer if tensor.name == "vae.decoder.conv_out.bias"]
    bias.CopyFrom(onnx.numpy_helper.from_array(np.array([0, 0, np.inf], np.float32), bias.name))
    onnx.save(graph, path)
    references = references_of(module, VAE_DECODER, tensors, checkpoint.spec, {})
    for strict in (True, False):
        with pytest.raises(CheckpointError, match="not finite, and PyTorch does not"):
            parity_of_onnx(path, component_of(path, tensors), references, "vae_decoder of tiny", strict=strict)


def test_an_image_of_one_colour(loaded: tuple[Checkpoint, LoadedModel], tmp_path: Path) -> None:
    checkpoint, model = loaded
    model.vae.decoder.conv_out.weight *= 0
    model.vae.decoder.conv_out.bias[:] = model.vae.decoder.conv_out.bias.new_tensor([0.2, -1.0, 1.0])
    with pytest.raises(CheckpointError, match=r"tiny: .* has one colour, #9900ff, .*--allow-differences"):
        reference_from_model(checkpoint, model, tmp_path)
    assert not list(tmp_path.iterdir())
    reference_from_model(checkpoint, model, tmp_path, strict=False)
    assert Image.open(tmp_path / FILE_NAME).getcolors() == [(64 * 96, (0x99, 0, 0xFF))]


def test_watching_changes_no_image(tiny_bundle: Path, shared_checkpoint: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from torch import Generator

    reference = read_manifest(tiny_bundle).reference
    pipeline = StableDiffusionPipeline.from_pretrained(shared_checkpoint, safety_checker=None, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        reference.prompt,
        height=reference.height,
        width=reference.width,
        num_inference_steps=reference.steps,
        guidance_scale=reference.guidance_scale,
        generator=Generator().manual_seed(reference.seed),
    ).images[0]
    kept = np.asarray(Image.open(tiny_bundle / reference.file.path)).astype(int)
    # With another number of threads PyTorch adds in another order.
    np.testing.assert_allclose(np.asarray(image), kept, atol=1)
