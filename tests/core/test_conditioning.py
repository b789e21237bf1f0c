"""What the UNet is told besides the text, against diffusers, and through the pipeline."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from diffuserve.bundle.manifest import write_manifest
from diffuserve.conditioning import conditioning_from_request, guidance_embedding, time_ids
from diffuserve.limits import Limits
from diffuserve.pipeline import Pipeline
from diffuserve.request import TextToImageRequest, request_from_fields
from diffuserve.stages import Conditioning, Float32
from diffuserve.tensors import UNET, stage_specs
from diffuserve_export.quiet import quiet
from tests.core.fakes import MODEL, FakeStages, make_bundle


def make_request(model: Any = MODEL, **fields: Any) -> TextToImageRequest:
    defaults = {"prompt": "a cat", "seed": 7, "steps": 2, "guidance_scale": 4.0, "format": "raw"}
    return request_from_fields({**defaults, **fields}, model, Limits.for_model(MODEL))


def test_time_ids_are_those_of_diffusers() -> None:
    import torch

    with quiet():
        from diffusers import StableDiffusionXLPipeline

    pipeline = SimpleNamespace(  # as much of one as the function looks at
        unet=SimpleNamespace(
            config=SimpleNamespace(addition_time_embed_dim=8),
            add_embedding=SimpleNamespace(linear_1=SimpleNamespace(in_features=6 * 8 + 5)),
        )
    )
    size = (768, 1152)  # height, width
    expected = StableDiffusionXLPipeline._get_add_time_ids(pipeline, size, (0, 0), size, torch.float32, 5)
    actual = time_ids(1152, 768)
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(actual, expected[0].numpy())


@pytest.mark.parametrize("size", [16, 17, 256, 512])
@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 1.5, 7.5, 50.0])
def test_guidance_embedding_is_that_of_diffusers(guidance_scale: float, size: int) -> None:
    import torch

    with quiet():
        from diffusers import LatentConsistencyModelPipeline, StableDiffusionPipeline

    actual = guidance_embedding(guidance_scale, size)
    assert (actual.dtype, actual.shape) == (np.float32, (size,))
    for pipeline in (StableDiffusionPipeline, LatentConsistencyModelPipeline):
        w = torch.tensor(guidance_scale - 1).repeat(1)
        expected = pipeline.get_guidance_scale_embedding(None, w, embedding_dim=size)[0].numpy()
        # An angle is up to 1000 w, so one step of float32 there is what the two exponentials may differ by.
        atol = 2 * float(np.spacing(np.float32(1000 * abs(guidance_scale - 1)))) + 1e-6
        np.testing.assert_allclose(actual, expected, atol=atol)


def test_the_unet_decides_what_is_made() -> None:
    sizes = {"max_tokens": 12, "hidden_size": 5, "latent_channels": 4}
    request = make_request(width=96, height=32)
    assert conditioning_from_request(request, stage_specs(**sizes)[UNET]) == {}
    xl = conditioning_from_request(request, stage_specs(**sizes, pooled_size=3)[UNET])
    assert {name: array.tolist() for name, array in xl.items()} == {"time_ids": [32, 96, 0, 0, 32, 96]}
    lcm = conditioning_from_request(request, stage_specs(**sizes, guidance_size=16)[UNET])
    assert lcm.keys() == {"timestep_cond"}
    np.testing.assert_array_equal(lcm["timestep_cond"], guidance_embedding(4.0, 16))


class RecordingStages(FakeStages):
    """Keeps what the UNet is conditioned on."""

    def __init__(self) -> None:
        super().__init__()
        self.conditioning: list[Conditioning] = []

    async def denoise(self, sample: Float32, timestep: Float32, conditioning: Conditioning) -> Float32:
        self.conditioning.append(conditioning)
        return await super().denoise(sample, timestep, conditioning)


def draw(bundle: Path, model: Any, **fields: Any) -> list[Conditioning]:
    stages = RecordingStages()

    async def main() -> None:
        pipeline = Pipeline(bundle, stages)
        try:
            async for _ in pipeline.generate(make_request(model, **fields)):
                pass
        finally:
            await pipeline.close()

    asyncio.run(main())
    return stages.conditioning


def write_bundle(folder: Path, *, guidance_embedded: bool = False, **sizes: int) -> Any:
    """A bundle of a model that takes more; returns its `ModelSpec`."""
    manifest = make_bundle(folder)
    tensors = stage_specs(max_tokens=12, hidden_size=5, latent_channels=4, **sizes)
    unet = msgspec.structs.replace(manifest.components[UNET], tensors=tensors[UNET])
    model = msgspec.structs.replace(MODEL, guidance_embedded=guidance_embedded)
    manifest = msgspec.structs.replace(manifest, model=model, components={**manifest.components, UNET: unet})
    write_manifest(folder, manifest)
    return model


def test_both_rows_of_an_image_know_its_size(tmp_path: Path) -> None:
    model = write_bundle(tmp_path / "bundle", pooled_size=3)
    calls = draw(tmp_path / "bundle", model, width=96, height=32, num_images=2, negative_prompt="a dog")
    assert len(calls) == 2
    for conditioning in calls:
        assert conditioning["time_ids"].shape == (4, 6)
        np.testing.assert_array_equal(conditioning["time_ids"], np.tile(time_ids(96, 32), (4, 1)))


@pytest.mark.parametrize("guidance_scale", [1.0, 8.0])
def test_embedded_guidance_takes_one_row(tmp_path: Path, guidance_scale: float) -> None:
    model = write_bundle(tmp_path / "bundle", guidance_embedded=True, guidance_size=16)
    request = make_request(model, guidance_scale=guidance_scale, num_images=3)
    assert (request.guided, request.rows) == (False, 3)
    calls = draw(tmp_path / "bundle", model, guidance_scale=guidance_scale, num_images=3)
    assert len(calls) == 2
    for conditioning in calls:
        expected = np.tile(guidance_embedding(guidance_scale, 16), (3, 1))
        np.testing.assert_array_equal(conditioning["timestep_cond"], expected)
