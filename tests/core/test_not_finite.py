"""What an engine makes that is not finite fails its own request, and no other; and is never kept."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from diffuserve.bundle.manifest import Manifest, read_manifest
from diffuserve.engines import load_engine
from diffuserve.engines.local_stages import EngineStages
from diffuserve.engines.processor import computes_bf16
from diffuserve.errors import StageFailed
from diffuserve.events import Completed
from diffuserve.images.decoding import Decoder
from diffuserve.stages import Conditioning, Engine, StageCalls, finite_rows
from diffuserve.stats import Stats
from diffuserve.tensors import FINITE, VAE_DECODER
from diffuserve.text.tokenizer import Tokenizer
from tests.core.fakes import MODEL, FakeStages, make_bundle
from tests.core.test_pipeline import completed, serving, start
from tests.core.tidy import run
from tests.core.tiny_graphs import make_real_bundle

SPOILT = [np.nan, np.inf, -np.inf]

engines = pytest.mark.parametrize(
    ("engine", "precision"),
    [
        ("onnxruntime", "fp32"),
        ("openvino", "fp32"),
        pytest.param(
            "openvino", "bf16", marks=pytest.mark.skipif(not computes_bf16(), reason="this processor has no bf16")
        ),
    ],
)


@pytest.fixture(scope="module")
def fake_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    make_bundle(folder)
    return folder


def test_finite_rows() -> None:
    hidden = np.zeros((5, 3, 2), np.float32)
    hidden[1, 2, 1], hidden[2, 0, 0] = np.nan, -np.inf
    pooled = np.ones((5, 4), np.float32)
    pooled[3, 3] = np.inf
    assert finite_rows({"hidden": hidden, "pooled": pooled}).tolist() == [True, False, False, False, True]
    image = np.zeros((2, 4, 4, 3), np.uint8)
    assert finite_rows({"image": image, FINITE: np.array([[True], [False]])}).tolist() == [True, False]
    assert finite_rows({"image": image}).tolist() == [True, True]
    assert finite_rows({"largest": np.full((1, 2), np.finfo(np.float32).max)}).tolist() == [True]


def test_an_image_that_is_not_finite_fails_its_own_request(fake_bundle: Path) -> None:
    """Of three requests that are drawn and decoded together; what is decoded says which: latents of another size."""

    async def main() -> None:
        stages = FakeStages(undecodable=lambda latent: latent.shape[-1] == 4)
        async with serving(fake_bundle, stages) as pipeline:
            good = [start(pipeline, seed=seed, steps=4) for seed in range(2)]
            bad = start(pipeline, seed=1, steps=4, width=32, num_images=3)
            with pytest.raises(
                StageFailed, match="not finite for 3 of 3 images, which would be black or white"
            ) as caught:
                await bad
            assert "a cat" not in str(caught.value)
            alone = [await completed(pipeline, seed=seed, steps=4) for seed in range(2)]
            for events, expected in zip(await asyncio.gather(*good), alone, strict=True):
                assert isinstance(events[-1], Completed)
                np.testing.assert_array_equal(events[-1].pixels, expected.pixels)
            counted = {name: pipeline.stats.total(name) for name in ("images", "images_not_finite", "requests_failed")}
            assert counted == {"images": 4, "images_not_finite": 3, "requests_failed": 1}

    run(main)


def test_one_of_several_images_fails_them_all(fake_bundle: Path) -> None:
    async def main() -> None:
        seen: list[Any] = []

        def second(latent: Any) -> bool:
            seen.append(latent)
            return len(seen) == 2

        async with serving(fake_bundle, FakeStages(undecodable=second)) as pipeline:
            with pytest.raises(StageFailed, match="not finite for 1 of 3 images"):
                await completed(pipeline, num_images=3)
            assert pipeline.stats.total("images_not_finite") == 1
            assert len((await completed(pipeline, num_images=3)).images) == 3

    run(main)


def test_images_of_several_calls_are_counted_together(fake_bundle: Path) -> None:
    async def main() -> None:
        stages = FakeStages(undecodable=lambda latent: True)
        async with serving(fake_bundle, stages) as pipeline:
            with pytest.raises(StageFailed, match="not finite for 11 of 11 images"):
                await completed(pipeline, num_images=11)
            assert stages.rows("decode") == [8, 3]
            assert pipeline.stats.total("images_not_finite") == 11

    run(main)


@pytest.mark.parametrize(
    "flags",
    [np.ones(2, np.float32), np.ones((2, 1), bool), np.ones(1, bool)],
    ids=["dtype", "rank", "count"],
)
def test_a_decoder_that_does_not_say_which_images_are_finite(fake_bundle: Path, flags: NDArray[Any]) -> None:
    class Stages(FakeStages):
        async def decode(self, latent_sample: Any) -> Any:
            pixels, _ = await super().decode(latent_sample)
            return pixels, flags

    async def main() -> None:
        async with serving(fake_bundle, Stages()) as pipeline:
            with pytest.raises(StageFailed, match=r"which images are finite, where bool \(2,\) was expected"):
                await completed(pipeline, num_images=2)

    run(main)


@pytest.mark.parametrize("value", SPOILT)
def test_a_text_that_is_not_finite_fails_its_own_requests_and_is_not_kept(fake_bundle: Path, value: float) -> None:
    bad_ids = Tokenizer(fake_bundle / "tokenizer", MODEL.max_tokens).encode([("bad", 1.0)]).input_ids

    class Stages(FakeStages):
        spoilt = True

        async def encode_text(self, input_ids: Mapping[str, NDArray[np.int32]]) -> Conditioning:
            encoded = dict(await super().encode_text(input_ids))
            if self.spoilt and (input_ids["input_ids"] == bad_ids).all():
                encoded["encoder_hidden_states"][0, -1, -1] = value
            return encoded

    async def main() -> None:
        stages = Stages()
        async with serving(fake_bundle, stages) as pipeline:
            good = start(pipeline, steps=4)
            bad = [start(pipeline, prompt="bad", steps=4), start(pipeline, negative_prompt="bad", steps=4)]
            for task in bad:
                with pytest.raises(StageFailed, match="text encoder returned values that are not finite") as caught:
                    await task
                assert "bad" not in str(caught.value)
            assert isinstance((await good)[-1], Completed)
            stages.spoilt = False
            assert await completed(pipeline, prompt="bad")

    run(main)


def on(engine: str, precision: str, folder: Path, manifest: Manifest) -> Engine:
    component = msgspec.structs.replace(manifest.components[VAE_DECODER], engine=engine, precision=precision)
    return load_engine(folder / VAE_DECODER / "model.onnx", component, threads=1)


@engines
def test_the_bundled_decoder_tells_which_images_are_finite(bundle: Path, engine: str, precision: str) -> None:
    """Whatever is beside them; the other images are what they are alone."""
    manifest = read_manifest(bundle)
    decoder = on(engine, precision, bundle, manifest)
    channels = manifest.model.latent_channels
    latents = np.random.default_rng(5).standard_normal((6, channels, 4, 8), dtype=np.float32)
    for row, value in ((1, np.nan), (2, np.inf), (4, -np.inf)):
        latents[row, row, 3, row] = value
    latents[3] = 3e38  # finite, and overflows
    together = decoder({"latent_sample": latents})
    assert together[FINITE].tolist() == [[True], [False], [False], [False], [False], [True]]
    assert together[FINITE].dtype == bool
    for row in range(6):
        alone = decoder({"latent_sample": latents[row : row + 1]})
        assert alone[FINITE].tolist() == [together[FINITE][row].tolist()]
    alone = decoder({"latent_sample": latents[[0, 5]]})
    np.testing.assert_array_equal(alone["image"], together["image"][[0, 5]])


@engines
def test_a_real_decoder_among_good_requests(tmp_path: Path, engine: str, precision: str) -> None:
    manifest = make_real_bundle(tmp_path)
    stats = Stats()
    latents = np.random.default_rng(0).standard_normal((4, 4, 6, 8), dtype=np.float32)
    spoilt = latents.copy()
    spoilt[2, 1, 3, 5] = np.inf

    async def main() -> list[Any]:
        with ThreadPoolExecutor(1) as workers:
            without_checker = msgspec.structs.replace(
                manifest,
                image_processor=None,
                components={VAE_DECODER: manifest.components[VAE_DECODER]},
            )
            decoder = Decoder(without_checker, StageCalls(stages), workers, stats)
            calls = (decoder.decode(each, 64, 48) for each in (latents, spoilt, latents[:2], spoilt[3:]))
            return await asyncio.gather(*calls, return_exceptions=True)

    stages = EngineStages({VAE_DECODER: on(engine, precision, tmp_path, manifest)})
    try:
        good, bad, first, last = asyncio.run(main())
    finally:
        stages.close()
    assert isinstance(bad, StageFailed)
    assert "not finite for 1 of 4 images" in str(bad)
    assert stats.total("images_not_finite") == 1
    np.testing.assert_array_equal(first[0], good[0][:2])
    np.testing.assert_array_equal(last[0], good[0][3:])
