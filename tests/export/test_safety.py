"""The safety checker: what is exported of it, against diffusers' own, and what is said of those that are not."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from diffuserve.bundle.manifest import ImageProcessor, read_manifest
from diffuserve.engines.local_stages import LocalStages
from diffuserve.engines.onnxruntime import OnnxRuntimeEngine
from diffuserve.errors import CheckpointError
from diffuserve.events import Completed
from diffuserve.graphs.sixteen_bit import sixteen_bit_from_onnx
from diffuserve.images.safety import clip_input_from_image, flagged_from_scores
from diffuserve.pipeline import Pipeline
from diffuserve.request import request_from_fields
from diffuserve.serving_options import Serving
from diffuserve_export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from diffuserve_export.checkpoint.hub import needed_files
from diffuserve_export.checkpoint.load import model_from_checkpoint
from diffuserve_export.checkpoint.safety import image_processor_from_configs
from diffuserve_export.export import bundle_from_checkpoint, unchanged_manifest
from diffuserve_export.graphs.modules import modules_from_model
from diffuserve_export.graphs.onnx import onnx_from_module
from diffuserve_export.parity import parity_of_onnx, references_of
from diffuserve_export.quiet import quiet
from tests.export.test_checkpoint import edit
from tests.export.tiny import add_safety_checker, component_of

CONFIG = "feature_extractor/preprocessor_config.json"
Images = list[NDArray[np.uint8]]


def colourful_images(count: int) -> Images:
    """Of different sizes, noise on a colour each."""
    rng = np.random.default_rng(0)
    sides = [(40, 40), (64, 96), (97, 61), (33, 128), (48, 48)]
    return [
        (rng.integers(0, 90, (*sides[at % len(sides)], 3)) + rng.integers(0, 165, 3)).astype(np.uint8)
        for at in range(count)
    ]


@pytest.fixture(scope="module")
def checked_checkpoint(shared_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a safety checker that flags some of `colourful_images(12)`; no test may change it."""
    folder = tmp_path_factory.mktemp("checked") / "tiny"
    return add_safety_checker(Path(shutil.copytree(shared_checkpoint, folder)), colourful_images(12))


@pytest.fixture
def spoilt(checked_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(checked_checkpoint, tmp_path / "spoilt"))


@pytest.fixture(scope="module")
def opened(checked_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(checked_checkpoint)


@pytest.fixture(scope="module")
def graph(opened: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported safety checker, compared with PyTorch."""
    path = tmp_path_factory.mktemp("safety") / "model.onnx"
    model = model_from_checkpoint(opened)
    modules, tensors = modules_from_model(model, opened.spec), opened.tensors
    onnx_from_module(modules["safety_checker"], "safety_checker", tensors["safety_checker"], opened.spec, path)
    references = references_of(modules["safety_checker"], "safety_checker", tensors["safety_checker"], opened.spec, {})
    tolerance, parity = parity_of_onnx(
        path, component_of(path, tensors["safety_checker"]), references, "safety_checker"
    )
    assert {record.shapes["clip_input"] for record in parity} == {(batch, 3, 32, 32) for batch in (1, 2, 5)}
    assert max(record.max_abs_error for record in parity) < tolerance / 10
    return path


def test_scores_and_decisions_are_those_of_diffusers(opened: Checkpoint, graph: Path) -> None:
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker, cosine_distance
    from transformers import CLIPImageProcessorPil

    with quiet():
        checker = StableDiffusionSafetyChecker.from_pretrained(opened.path / "safety_checker")
        processor = CLIPImageProcessorPil.from_pretrained(opened.path / "feature_extractor")
    images = colourful_images(40)
    assert opened.image_processor is not None
    clip_input = np.stack([clip_input_from_image(image, opened.image_processor) for image in images])
    reference = processor(images, return_tensors="pt").pixel_values
    np.testing.assert_array_equal(clip_input, reference.numpy())
    with quiet():
        blackened, expected = checker(reference, [torch.ones(1) for _ in images])
    scores = OnnxRuntimeEngine(graph)({"clip_input": clip_input})["concept_scores"]
    flagged = flagged_from_scores(scores)
    assert flagged.tolist() == expected == [not image.any() for image in blackened]
    assert 0 < flagged.sum() < len(images)
    with torch.no_grad():
        embeds = checker.visual_projection(checker.vision_model(reference)[1])
        cosines = cosine_distance(embeds, checker.concept_embeds).numpy()
        special = cosine_distance(embeds, checker.special_care_embeds).numpy()
    special_care = (np.round(special - checker.special_care_embeds_weights.detach().numpy(), 3) > 0).any(axis=1)
    assert 0 < special_care.sum() < len(images)
    plain = cosines - checker.concept_embeds_weights.detach().numpy()
    np.testing.assert_allclose(scores, plain + 0.01 * special_care[:, np.newaxis], atol=1e-5)


def test_special_care_begins_where_diffusers_rounds(opened: Checkpoint) -> None:
    """0.0004 above the threshold rounds to nothing, 0.0006 to 0.001."""
    import torch

    model = model_from_checkpoint(opened)
    module = modules_from_model(model, opened.spec)["safety_checker"]
    checker = model.safety_checker
    assert checker is not None
    clip_input = torch.randn(1, 3, 32, 32)
    weights = checker.special_care_embeds_weights
    with torch.no_grad():
        weights.fill_(2)
        without = module(clip_input)
        weights.fill_(-1)
        np.testing.assert_allclose(module(clip_input) - without, 0.01, atol=1e-6)
        from diffusers.pipelines.stable_diffusion.safety_checker import cosine_distance

        embeds = checker.visual_projection(checker.vision_model(clip_input)[1])
        cosines = cosine_distance(embeds, checker.special_care_embeds)[0]
        for above, added in ((0.0004, 0.0), (0.0006, 0.01)):
            weights.copy_(cosines - above)
            np.testing.assert_allclose(module(clip_input) - without, added, atol=1e-6)


def test_the_graph_converts_to_fp16(graph: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.onnx"
    sixteen_bit_from_onnx(graph, half, "fp16")
    clip_input = np.random.default_rng(0).standard_normal((3, 3, 32, 32), dtype=np.float32)
    expected = OnnxRuntimeEngine(graph)({"clip_input": clip_input})["concept_scores"]
    import onnxruntime

    session = onnxruntime.InferenceSession(str(half), providers=["CPUExecutionProvider"])
    [actual] = session.run(None, {"clip_input": clip_input})
    np.testing.assert_allclose(actual, expected, atol=0.01)


def test_published_weights_have_one_more_level_in_their_names(spoilt: Path) -> None:
    """Those of Stable Diffusion 1.x were saved by a transformers that had the vision model's parts in a part."""
    import torch
    from safetensors.torch import load_file, save_file

    expected = model_from_checkpoint(open_checkpoint(spoilt)).safety_checker
    file = spoilt / "safety_checker" / "model.safetensors"
    old = {
        name.replace("vision_model.", "vision_model.vision_model.", 1): part for name, part in load_file(file).items()
    }
    old["vision_model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(old, file, metadata={"format": "pt"})
    actual = model_from_checkpoint(open_checkpoint(spoilt)).safety_checker
    assert expected is not None
    assert actual is not None
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(actual.state_dict()[name], weight, rtol=0, atol=0)


def test_what_belongs_to_it(opened: Checkpoint, shared_checkpoint: Path) -> None:
    plain = open_checkpoint(shared_checkpoint)
    assert set(opened.tensors) - set(plain.tensors) == {"safety_checker"}
    assert opened.sha256 != plain.sha256
    assert opened.parameters > plain.parameters
    assert plain.image_processor is None
    assert not plain.safety_checker_left_out
    assert opened.image_processor == ImageProcessor(
        shortest_edge_px=40,
        crop_px=32,
        resample=3,
        rescale_factor=1 / 255,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    )


def test_it_is_left_out_when_asked(checked_checkpoint: Path, shared_checkpoint: Path, spoilt: Path) -> None:
    left_out = open_checkpoint(checked_checkpoint, safety_checker=False)
    assert set(left_out.tensors) == set(open_checkpoint(shared_checkpoint).tensors)
    assert left_out.safety_checker_left_out
    assert model_from_checkpoint(left_out).safety_checker is None
    # Nothing was left out of a checkpoint that has none.
    assert not open_checkpoint(shared_checkpoint, safety_checker=False).safety_checker_left_out
    shutil.rmtree(spoilt / "safety_checker")
    shutil.rmtree(spoilt / "feature_extractor")
    assert open_checkpoint(spoilt, safety_checker=False).safety_checker_left_out


def test_the_choice_makes_another_bundle(checked_checkpoint: Path, shared_checkpoint: Path, tiny_bundle: Path) -> None:
    assert unchanged_manifest(open_checkpoint(shared_checkpoint), tiny_bundle) is not None
    assert unchanged_manifest(open_checkpoint(checked_checkpoint), tiny_bundle) is None
    assert unchanged_manifest(open_checkpoint(checked_checkpoint, safety_checker=False), tiny_bundle) is None


def test_the_hub_brings_it() -> None:
    files = [
        "model_index.json",
        "safety_checker/config.json",
        "safety_checker/model.fp16.safetensors",
        "feature_extractor/preprocessor_config.json",
    ]
    extra = ["safety_checker/pytorch_model.bin", "safety_checker/flax_model.msgpack"]
    assert set(needed_files([*files, *extra], weights=True)) == set(files)


def test_early_configs_write_sizes_as_numbers() -> None:
    early = {"size": 224, "crop_size": 224, "resample": 3, "feature_extractor_type": "CLIPFeatureExtractor"}
    processor = image_processor_from_configs("x", {"feature_extractor": early, "safety_checker": {"vision_config": {}}})
    assert (processor.shortest_edge_px, processor.crop_px, processor.resample) == (224, 224, 3)
    assert processor.rescale_factor == 1 / 255


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: shutil.rmtree(path / name)


def editing(name: str, **values: Any) -> Callable[[Path], None]:
    return lambda path: edit(path / name, **values)


def pickled(path: Path) -> None:
    (path / "safety_checker" / "model.safetensors").rename(path / "safety_checker" / "pytorch_model.bin")


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (remove("safety_checker"), "lacks the component safety_checker.*--no-safety-checker"),
    "no extractor folder": (remove("feature_extractor"), "lacks the component feature_extractor.*--no-safety-checker"),
    "no extractor": (
        editing("model_index.json", feature_extractor=[None, None]),
        "lacks the component feature_extractor.*--no-safety-checker",
    ),
    "no extractor config": (lambda path: (path / CONFIG).unlink(), "preprocessor_config.json is missing"),
    "own code": (
        editing("model_index.json", safety_checker=["my_checker", "MyChecker"]),
        "my_checker.MyChecker. Supported: StableDiffusionSafetyChecker; .*own code is never run",
    ),
    "other extractor": (
        editing("model_index.json", feature_extractor=["transformers", "ViTImageProcessor"]),
        "ViTImageProcessor. Supported: CLIPImageProcessor",
    ),
    "pickle": (pickled, "as a pickle.*only safetensors are read"),
    "other size": (editing(CONFIG, crop_size=24), "images of 24 px, and the safety checker takes 32 px"),
    "no crop": (editing(CONFIG, do_center_crop=False), "do_center_crop=False; supported: true.*--no-safety-checker"),
    "resize to a square": (
        editing(CONFIG, size={"height": 40, "width": 40}),
        "KeyError.*must resize the shortest_edge",
    ),
    "longest edge": (editing(CONFIG, size={"shortest_edge": 40, "longest_edge": 50}), "unknown: longest_edge"),
    "oblong": (editing(CONFIG, crop_size={"height": 32, "width": 40}), "cannot be read.*crop a square"),
    "grey": (editing(CONFIG, image_mean=[0.5]), "for three colours"),
    "no division by zero": (editing(CONFIG, image_std=[0, 1, 1]), "cannot prepare an image"),
    "crop outside": (editing(CONFIG, size=24), "must be part of what is resized"),
    "unknown filter": (editing(CONFIG, resample=77), "77 is not a valid Resampling"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str, spoilt: Path) -> None:
    spoil, message = REFUSED[case]
    spoil(spoilt)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(spoilt)


def test_refuses_weights_of_another_shape(spoilt: Path) -> None:
    config = json.loads((spoilt / "safety_checker" / "config.json").read_text())
    edit(spoilt / "safety_checker" / "config.json", vision_config={**config["vision_config"], "num_hidden_layers": 3})
    with pytest.raises(
        CheckpointError,
        match=r"safety_checker: .*lacks 16 of the weights that the configs describe: vision_model.encoder.layers.2",
    ):
        model_from_checkpoint(open_checkpoint(spoilt))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_whole_export_withholds_what_diffusers_withholds(checkpoint: Path, tmp_path: Path) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "np"}

    def drawn(path: Path, **parts: Any) -> tuple[NDArray[np.float32], list[bool] | None]:
        with quiet():
            pipeline = StableDiffusionPipeline.from_pretrained(path, local_files_only=True, **parts)
            pipeline.set_progress_bar_config(disable=True)
            generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
            output = pipeline(["a cat"] * 8, generator=generators, height=64, width=96, **settings)
        return output.images, output.nsfw_content_detected

    unchecked, _ = drawn(checkpoint, safety_checker=None)
    add_safety_checker(checkpoint, list((unchecked * 255).round().astype(np.uint8)))
    expected, flagged = drawn(checkpoint)
    assert flagged is not None
    assert 0 < sum(flagged) < 8
    bundle = bundle_from_checkpoint(checkpoint, tmp_path / "bundle")
    manifest = read_manifest(bundle)
    assert manifest.has_safety_checker
    assert not manifest.safety_checker_left_out
    assert unchanged_manifest(open_checkpoint(checkpoint), bundle) is not None
    assert unchanged_manifest(open_checkpoint(checkpoint, safety_checker=False), bundle) is None
    stages = LocalStages(bundle)

    async def draw() -> Completed:
        pipeline = Pipeline(bundle, stages, serving=Serving(require_safety_checker=True))
        fields = {"prompt": "a cat", "seed": 0, "num_images": 8, "steps": 2, "guidance_scale": 1.0, "sampler": "ddim"}
        request = request_from_fields({**fields, "format": "raw"}, manifest.model, pipeline.limits)
        try:
            *_, last = [event async for event in pipeline.generate(request)]
        finally:
            await pipeline.close()
        assert isinstance(last, Completed)
        return last

    try:
        done = asyncio.run(draw())
    finally:
        stages.close()
    assert list(done.flagged) == flagged
    assert np.abs(done.pixels - (expected * 255).round()).max() <= 2
