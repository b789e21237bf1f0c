"""The bundled model, its engines in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from diffuserve.bundle.manifest import read_manifest, write_manifest
from diffuserve.engines import load_engine
from diffuserve.engines.local_stages import EngineStages, LocalStages
from diffuserve.errors import BundleError, StageFailed
from diffuserve.events import Completed, Event, Progressed
from diffuserve.limits import Limits
from diffuserve.pipeline import Pipeline
from diffuserve.request import request_from_fields
from diffuserve.stages import StageCalls
from diffuserve.tensors import STAGES, TEXT_ENCODER, UNET, VAE_DECODER, VAE_ENCODER
from diffuserve.text.tokenizer import Tokenizer
from tests.core.torch_facade import TorchFacade


@pytest.fixture(scope="module")
def stages(bundle: Path) -> Iterator[LocalStages]:
    local = LocalStages(bundle)
    yield local
    local.close()


def generate(bundle: Path, stages: LocalStages, seed: int) -> Completed:
    model = read_manifest(bundle).model
    fields = {"prompt": "a red apple", "seed": seed, "steps": 2, "width": 64, "height": 96, "num_images": 2}
    request = request_from_fields(fields, model, Limits.for_model(model))

    async def main() -> Completed:
        pipeline = Pipeline(bundle, stages)
        try:
            *_, last = [event async for event in pipeline.generate(request)]
        finally:
            await pipeline.close()
        assert isinstance(last, Completed)
        return last

    return asyncio.run(main())


def test_the_same_request_gives_the_same_files(bundle: Path, stages: LocalStages) -> None:
    first, again, other = (generate(bundle, stages, seed) for seed in (3, 3, 5))
    assert (first.pixels.dtype, first.pixels.shape) == (np.uint8, (2, 96, 64, 3))
    assert first.images == again.images
    assert not set(first.images) & set(other.images)
    assert first.pixels.std() > 5  # a picture, not a plain colour


def test_shapes(bundle: Path, stages: LocalStages) -> None:
    model = read_manifest(bundle).model
    tokenizer = Tokenizer(bundle / "tokenizer", model.max_tokens)
    input_ids = np.concatenate([tokenizer.encode([(text, 1.0)]).input_ids for text in "ab"])
    sample = np.random.default_rng(0).standard_normal((2, model.latent_channels, 16, 24)).astype(np.float32)

    calls = StageCalls(stages)

    async def main() -> None:
        conditioning = await calls.encode_text({"input_ids": input_ids})
        assert {name: array.shape for name, array in conditioning.items()} == {
            "encoder_hidden_states": (2, model.max_tokens, model.hidden_size)
        }
        noise = await calls.denoise(sample, np.array([999, 3], np.float32), conditioning)
        assert (noise.dtype, noise.shape) == (np.float32, sample.shape)
        image, finite = await calls.decode(sample)
        factor = model.vae_scale_factor
        assert (image.dtype, image.shape) == (np.uint8, (2, 16 * factor, 24 * factor, 3))
        assert finite.tolist() == [True, True]

    asyncio.run(main())


def test_an_engine_that_refuses_its_input_fails_the_call_only(bundle: Path, stages: LocalStages) -> None:
    model = read_manifest(bundle).model
    with pytest.raises(StageFailed, match="The stage text_encoder failed"):
        asyncio.run(StageCalls(stages).encode_text({"input_ids": np.zeros((1, model.max_tokens), np.int8)}))
    assert asyncio.run(StageCalls(stages).encode_text({"input_ids": np.zeros((1, model.max_tokens), np.int32)}))


@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_a_damaged_bundle_is_refused(bundle: Path, tmp_path: Path, damage: str) -> None:
    manifest = read_manifest(bundle)
    for file in manifest.all_files():
        path = tmp_path / file.path
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((bundle / file.path).read_bytes())
    write_manifest(tmp_path, manifest)
    path = tmp_path / manifest.components[UNET].files[0].path
    if damage == "missing":
        path.unlink()
    else:
        with path.open("r+b") as stream:
            stream.seek(path.stat().st_size // 2)
            byte = stream.read(1)[0]
            stream.seek(-1, 1)
            stream.write(bytes([byte ^ 1]))
    with pytest.raises(BundleError, match=f"{path} is {'missing' if damage == 'missing' else 'damaged'}"):
        LocalStages(tmp_path)


def test_engines_that_cannot_be_loaded(bundle: Path, tmp_path: Path) -> None:
    component = read_manifest(bundle).components[TEXT_ENCODER]
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(BundleError, match=f"ONNX Runtime cannot load {path}"):
        load_engine(path, component, threads=1)
    with pytest.raises(BundleError, match="made for the engine 'abacus'; this diffuserve has: onnxruntime"):
        load_engine(path, msgspec.structs.replace(component, engine="abacus"), threads=1)


def test_the_manifest_describes_every_stage(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert set(manifest.components) == set(STAGES)
    for component in manifest.components.values():
        assert component.parity
        assert all(parity.max_abs_error <= component.tolerance for parity in component.parity)


def drawn(
    bundle: Path, on_device: set[str], **fields: object
) -> tuple[Completed, list[Progressed], dict[str, TorchFacade]]:
    """The bundled model with some of its stages on engines as PyTorch's are."""
    manifest = read_manifest(bundle)
    engines = {
        name: load_engine(bundle / component.files[0].path, component, threads=1)
        for name, component in manifest.components.items()
        if name != VAE_ENCODER
    }
    facades = {name: TorchFacade(engines[name]) for name in on_device}
    given = {"prompt": "a red apple", "seed": 3, "steps": 4, "num_images": 2, "progress": True, "preview": 2, **fields}
    request = request_from_fields(given, manifest.model, Limits.for_model(manifest.model))
    stages = EngineStages({**engines, **facades})

    async def main() -> list[Event]:
        pipeline = Pipeline(bundle, stages)
        try:
            return [event async for event in pipeline.generate(request)]
        finally:
            await pipeline.close()

    try:
        _, *steps, last = asyncio.run(main())
    finally:
        stages.close()
    assert isinstance(last, Completed)
    return last, [step for step in steps if isinstance(step, Progressed)], facades


@pytest.mark.parametrize(
    ("on_device", "sampler"),
    [
        ({UNET}, "dpmpp_2m"),
        ({TEXT_ENCODER, UNET, VAE_DECODER}, "euler_a"),
        ({TEXT_ENCODER, VAE_DECODER}, "dpmpp_2m"),
    ],
)
def test_tensors_stay_on_the_unet_s_device(bundle: Path, on_device: set[str], sampler: str) -> None:
    expected, known_steps, _ = drawn(bundle, set(), sampler=sampler)
    completed, steps, facades = drawn(bundle, on_device, sampler=sampler)
    assert (completed.pixels.shape, completed.pixels.dtype) == (expected.pixels.shape, np.uint8)
    difference = np.abs(completed.pixels.astype(int) - expected.pixels)
    assert difference.max() <= 2
    assert difference.mean() < 0.01
    assert [len(step.previews) for step in steps] == [len(step.previews) for step in known_steps] == [0, 2, 0, 2]
    # What comes before the loop is on the host.
    kinds = {name: set(facade.kinds) for name, facade in facades.items()}
    assert kinds == {name: {name != TEXT_ENCODER and UNET in on_device} for name in on_device}
