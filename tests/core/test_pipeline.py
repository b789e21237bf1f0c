"""The pipeline over stages that are a few lines of numpy."""

from __future__ import annotations

import asyncio
import io
import json
import re
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from diffuserve.bundle.manifest import read_manifest, write_manifest
from diffuserve.errors import BundleError, DeadlineExceeded, Draining, QueueFull, StageFailed
from diffuserve.events import Accepted, Completed, Event, Progressed
from diffuserve.images.encoding import encode_image
from diffuserve.images.infotext import infotext
from diffuserve.limits import MAX_DECODE_BATCH, Limits
from diffuserve.pipeline import Pipeline
from diffuserve.request import TextToImageRequest, request_from_fields
from diffuserve.serving_options import Serving
from diffuserve.tensors import TensorSpec
from diffuserve.text.tokenizer import Tokenizer
from tests.clocks import running_clock
from tests.core.fakes import MODEL, FakeStages, make_bundle
from tests.core.tidy import run

STAGES = ("encode_text", "denoise", "decode")


@pytest.fixture(scope="module")
def fake_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("bundle")
    make_bundle(folder)
    return folder


def make_request(**fields: Any) -> TextToImageRequest:
    defaults = {"prompt": "a cat", "seed": 7, "steps": 3, "guidance_scale": 4.0, "format": "raw"}
    return request_from_fields({**defaults, **fields}, MODEL, Limits.for_model(MODEL))


@asynccontextmanager
async def serving(
    bundle: Path, stages: FakeStages, limits: Limits | None = None, **options: Any
) -> AsyncIterator[Pipeline]:
    """A pipeline that must have nothing left to do at the end."""
    pipeline = Pipeline(bundle, stages, limits, Serving(**options))
    try:
        yield pipeline
        assert_free(pipeline)
    finally:
        await pipeline.close()


def unanswered(pipeline: Pipeline) -> int:
    """Accepted and not yet answered."""
    gauges = pipeline.gauges()
    return gauges["requests_waiting"] + gauges["requests_running"]


def assert_free(pipeline: Pipeline) -> None:
    left = (
        unanswered(pipeline),
        pipeline.gauges()["requests_waiting"],
        pipeline._loop.images_active,
        pipeline._loop.rows_left,
    )
    assert left == (0, 0, 0, 0)


async def draw(pipeline: Pipeline, **fields: Any) -> list[Event]:
    return [event async for event in pipeline.generate(make_request(**fields))]


async def completed(pipeline: Pipeline, **fields: Any) -> Completed:
    last = (await draw(pipeline, **fields))[-1]
    assert isinstance(last, Completed)
    return last


def start(pipeline: Pipeline, **fields: Any) -> asyncio.Task[list[Event]]:
    return asyncio.create_task(draw(pipeline, **fields))


def test_events_in_order(fake_bundle: Path) -> None:
    async def main() -> None:
        async with serving(fake_bundle, FakeStages()) as pipeline:
            quiet = await draw(pipeline)
            assert [type(event) for event in quiet] == [Accepted, Completed]
            accepted, *steps, last = await draw(pipeline, progress=True)
            assert accepted == Accepted(3, 0)
            assert [(step.step, step.steps, step.previews) for step in steps] == [(1, 3, ()), (2, 3, ()), (3, 3, ())]
            assert isinstance(last, Completed)

    run(main)


def test_previews_come_every_kth_step(fake_bundle: Path) -> None:
    async def main() -> None:
        async with serving(fake_bundle, FakeStages()) as pipeline:
            events = await draw(pipeline, steps=7, preview=3, progress=True, num_images=2)
            steps = [event for event in events if isinstance(event, Progressed)]
            assert [len(event.previews) for event in steps] == [0, 0, 2, 0, 0, 2, 0]
            for preview in (*steps[2].previews, *steps[5].previews):
                with Image.open(io.BytesIO(preview)) as image:
                    assert (image.format, image.size) == ("PNG", (8, 6))
            assert len({*steps[2].previews, *steps[5].previews}) == 4
            assert not any(isinstance(event, Progressed) for event in await draw(pipeline, preview=1))

    run(main)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp", "raw"])
def test_completed(fake_bundle: Path, format: str) -> None:
    async def main() -> None:
        fields = {"num_images": 3, "seed": 2**32 - 2, "format": format, "width": 96}
        async with serving(fake_bundle, FakeStages()) as pipeline:
            done = await completed(pipeline, **fields)
            observed = dict(pipeline.stats.collect())
        assert observed["queue_seconds"] == done.queue_s  # one span, one name
        assert observed["queue_seconds"] <= observed["first_step_seconds"] <= done.queue_s + done.denoise_s
        assert done.seeds == (2**32 - 2, 2**32 - 1, 0)
        assert (done.pixels.dtype, done.pixels.shape) == (np.uint8, (3, 48, 96, 3))
        manifest, request = read_manifest(fake_bundle), make_request(**fields)
        assert done.parameters == tuple(infotext(request, manifest, seed) for seed in done.seeds)
        expected = [encode_image(image, format, text) for image, text in zip(done.pixels, done.parameters, strict=True)]
        assert list(done.images) == expected
        assert done.warnings == ()
        assert min(done.queue_s, done.denoise_s) >= 0
        assert 0 < done.queue_s + done.denoise_s <= done.total_s

    run(main)


def test_images_are_those_of_their_own_seeds(fake_bundle: Path) -> None:
    async def main() -> None:
        count = MAX_DECODE_BATCH + 2
        stages = FakeStages()
        async with serving(fake_bundle, stages) as pipeline:
            together = await completed(pipeline, num_images=count, sampler="euler_a")
            assert stages.rows("decode") == [MAX_DECODE_BATCH, 2]
            for index in (0, MAX_DECODE_BATCH - 1, count - 1):
                alone = await completed(pipeline, seed=7 + index, sampler="euler_a")
                np.testing.assert_allclose(together.pixels[index], alone.pixels[0], atol=1)
        assert len({image.tobytes() for image in together.pixels}) == count

    run(main)


@pytest.mark.parametrize(("guidance_scale", "rows"), [(0, 1), (1, 1), (1.5, 2)])
def test_guidance_takes_a_second_row(fake_bundle: Path, guidance_scale: float, rows: int) -> None:
    async def main() -> None:
        stages = FakeStages()
        async with serving(fake_bundle, stages) as pipeline:
            done = await completed(pipeline, guidance_scale=guidance_scale, num_images=2, negative_prompt="a dog")
            other = await completed(pipeline, guidance_scale=guidance_scale, num_images=2, negative_prompt="")
        assert stages.rows("denoise") == [2 * rows] * 6
        assert stages.rows("encode_text") == [1] * (1 if rows == 1 else 3)
        assert np.array_equal(done.pixels, other.pixels) == (rows == 1)

    run(main)


def test_requests_share_calls(fake_bundle: Path) -> None:
    async def main() -> None:
        stages = FakeStages(held="encode_text")
        async with serving(fake_bundle, stages) as pipeline:
            requests = [start(pipeline, seed=seed, prompt="a cat", negative_prompt="a cat") for seed in range(4)]
            await stages.entered.wait()
            assert unanswered(pipeline) == pipeline.gauges()["requests_waiting"] == 4
            stages.release.set()
            await asyncio.gather(*requests)
        assert stages.rows("denoise") == [8, 8, 8]
        assert stages.rows("encode_text") == [1]

    run(main)


def test_long_prompts_are_warned_about(fake_bundle: Path) -> None:
    async def main() -> None:
        long = "red blue cat dog " * 10
        tokenizer = Tokenizer(fake_bundle / "tokenizer", MODEL.max_tokens)
        for chunks in (1, 3):
            dropped = tokenizer.encode([(long, 1.0)], chunks).dropped_text
            limits = replace(Limits.for_model(MODEL), max_prompt_chunks=chunks)
            async with serving(fake_bundle, FakeStages(), limits) as pipeline:
                assert (await completed(pipeline, prompt=long)).warnings == (
                    f"The prompt does not fit into {chunks} x 10 tokens; this end of it was not used: {dropped!r}",
                )
                [warning] = (await completed(pipeline, negative_prompt=f"({long}:0.9)")).warnings
                assert warning == (
                    f"The negative_prompt does not fit into {chunks} x 10 tokens; this end of it was not used: {dropped!r}"
                )
                assert (await completed(pipeline, prompt=long.removesuffix(dropped))).warnings == ()
                [warning] = (await completed(pipeline, prompt=long * 9 + "the end")).warnings
                assert re.search(r"not used: '[a-z ]{100}' \.\.\. '[a-z ]{93}the end'$", warning)

    run(main)


def test_a_break_takes_chunks(fake_bundle: Path) -> None:
    async def main() -> None:
        limits = replace(Limits.for_model(MODEL), max_prompt_chunks=2)
        stages = Recording()
        async with serving(fake_bundle, stages, limits) as pipeline:
            done = await completed(pipeline, prompt="a dog BREAK red", negative_prompt="blue BREAK", steps=1)
            assert done.warnings == ()
            assert ", Pad conds: True, " in done.parameters[0]
            done = await completed(pipeline, prompt="a dog", negative_prompt="a BREAK b BREAK c BREAK d", steps=1)
            assert done.warnings == (
                "The negative_prompt does not fit into 2 x 10 tokens; this end of it was not used: 'c BREAK d'",
            )
            done = await completed(pipeline, prompt="a BREAK b", negative_prompt="BREAK BREAK", steps=1)
            assert "Pad conds" not in done.parameters[0]
            assert "Pad conds" not in (await completed(pipeline, prompt="a BREAK b", guidance_scale=1)).parameters[0]
        assert {conditioning["encoder_hidden_states"].shape[1] for conditioning in stages.conditionings} == {24}

    run(main)


def test_what_is_drawn_as_text_is_warned_about(fake_bundle: Path) -> None:
    async def main() -> None:
        async with serving(fake_bundle, FakeStages()) as pipeline:
            syntax = "a [cat:dog:0.5] AND [a|b] <lora:x:1>"
            both = (await completed(pipeline, prompt=syntax, negative_prompt=syntax)).warnings
            assert [re.sub(r"^Drawn as text: the (\w+) has (\S+?),? .*", r"\1 \2", warning) for warning in both] == [
                "prompt <lora:...>",
                "prompt AND",
                "prompt [from:to:when]",
                "prompt [this|that]",
                "negative_prompt <lora:...>",
                "negative_prompt [from:to:when]",
                "negative_prompt [this|that]",
            ]
            assert not any("dog" in warning or "x:1" in warning for warning in both)
            # Without guidance there is no negative prompt.
            assert (await completed(pipeline, prompt="a", negative_prompt=syntax, guidance_scale=1)).warnings == ()

    run(main)


class Recording(FakeStages):
    """Keeps what the UNet was conditioned on, a list of rows for each call."""

    def __init__(self) -> None:
        super().__init__()
        self.conditionings: list[Mapping[str, Any]] = []

    async def denoise(self, sample: Any, timestep: Any, conditioning: Mapping[str, Any]) -> Any:
        self.conditionings.append(conditioning)
        return await super().denoise(sample, timestep, conditioning)


def test_every_variant_of_a_prompt_draws_its_own_image(fake_bundle: Path) -> None:
    async def main() -> None:
        long = "red blue cat dog " * 4
        prompts = [
            "a cat",
            "a dog",
            "cat a",
            "(a cat)",
            "a (cat)",
            "(a) cat",
            "[a cat]",
            "a (cat:1.3)",
            "a (cat:0)",
            r"a \(cat\)",
            ") a cat",
            long,
            long + "a cat",
            f"({long}) a cat",
        ]
        requests = [
            {"prompt": prompt, "negative_prompt": negative_prompt, "guidance_scale": 8}
            for prompt in prompts
            for negative_prompt in ("", long)
        ]
        async with serving(fake_bundle, FakeStages()) as pipeline:
            together = await asyncio.gather(*(completed(pipeline, **request) for request in requests))
            assert len({done.pixels.tobytes() for done in together}) == len(together)
            for request, done in zip(requests[::5], together[::5], strict=True):
                alone = await completed(pipeline, **request)
                np.testing.assert_allclose(done.pixels, alone.pixels, atol=1)
                assert done.parameters[0].startswith(f"{request['prompt']}\n")  # as written

    run(main)


def test_a_long_prompt_is_one_call_and_its_negative_prompt_as_long(fake_bundle: Path) -> None:
    async def main() -> None:
        stages = Recording()
        async with serving(fake_bundle, stages) as pipeline:
            await completed(pipeline, prompt="dog " * 15, negative_prompt="a cat", steps=1)
            await completed(pipeline, prompt="dog " * 15, guidance_scale=1, steps=1)
            await completed(pipeline, prompt="a cat", negative_prompt="dog " * 25, num_images=2, steps=1)
        assert stages.rows("encode_text") == [2, 1, 1, 3]  # both prompts, the empty one, the second negative prompt
        shapes = [conditioning["encoder_hidden_states"].shape for conditioning in stages.conditionings]
        assert shapes == [(2, 24, 5), (1, 24, 5), (4, 36, 5)]

    run(main)


def test_prompts_of_other_lengths_are_not_in_each_others_calls(fake_bundle: Path) -> None:
    async def main() -> None:
        stages = Recording()
        async with serving(fake_bundle, stages) as pipeline:
            requests = [
                {"prompt": "dog " * words, "seed": words, "steps": 4, "sampler": sampler}
                for words in (1, 25, 9, 21, 15)
                for sampler in ("euler", "euler_a")
            ]
            together = await asyncio.gather(*(completed(pipeline, **request) for request in requests))
            assert len(stages.conditionings) <= 3 * 4 + 3  # the last to be encoded may begin a call later
            lengths = {conditioning["encoder_hidden_states"].shape[1] for conditioning in stages.conditionings}
            assert lengths == {12, 24, 36}
            for request, done in zip(requests, together, strict=True):
                alone = await completed(pipeline, **request)
                np.testing.assert_allclose(done.pixels, alone.pixels, atol=1)

    run(main)


def make_bundle_of_two_encoders(folder: Path, *, zero_empty_negative: bool) -> None:
    """With a second tokenizer, which pads with "!", as Stable Diffusion XL's."""
    manifest = make_bundle(folder)
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    config = folder / "tokenizer_2" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "pad_token": "!"}))
    encoder = manifest.components["text_encoder"]
    inputs = (*encoder.tensors.inputs, TensorSpec("input_ids_2", "INT32", (MODEL.max_tokens,)))
    encoder = msgspec.structs.replace(encoder, tensors=msgspec.structs.replace(encoder.tensors, inputs=inputs))
    manifest = msgspec.structs.replace(
        manifest,
        components={**manifest.components, "text_encoder": encoder},
        model=msgspec.structs.replace(MODEL, zero_empty_negative=zero_empty_negative),
    )
    write_manifest(folder, manifest)


@pytest.mark.parametrize("zero_empty_negative", [True, False])
def test_two_text_encoders(tmp_path: Path, zero_empty_negative: bool) -> None:
    make_bundle_of_two_encoders(tmp_path, zero_empty_negative=zero_empty_negative)

    class Stages(Recording):
        async def encode_text(self, input_ids: Mapping[str, Any]) -> Any:
            conditioning = await super().encode_text(input_ids)
            return {**conditioning, "text_embeds": input_ids["input_ids_2"][:, 1:4].astype(np.float32)}

    async def main() -> None:
        stages = Stages()
        async with serving(tmp_path, stages) as pipeline:
            await completed(pipeline, prompt="a (red:1.5) " + "dog " * 18, steps=1)
        tokenizer = Tokenizer(tmp_path / "tokenizer_2", MODEL.max_tokens)
        [conditioning] = stages.conditionings
        assert conditioning["encoder_hidden_states"].shape == (2, 24, 5)
        [ids], [padding] = (tokenizer.encode([(text, 1.0)]).input_ids for text in ("a red dog", ""))
        assert padding[2] != padding[1]  # the end, and then "!"
        np.testing.assert_array_equal(conditioning["text_embeds"][0], ids[1:4])  # the first chunk's, without weights
        if zero_empty_negative:
            assert not any(array[1].any() for array in conditioning.values())
        else:
            np.testing.assert_array_equal(conditioning["text_embeds"][1], padding[1:4])
            assert conditioning["encoder_hidden_states"][1].any()

    run(main)


def test_a_missing_second_tokenizer_is_named(tmp_path: Path) -> None:
    make_bundle_of_two_encoders(tmp_path, zero_empty_negative=False)
    shutil.rmtree(tmp_path / "tokenizer_2")
    with pytest.raises(BundleError, match=r"tokenizer_2/tokenizer_config\.json is missing"):
        Pipeline(tmp_path, FakeStages())


@pytest.mark.parametrize("stage", STAGES)
def test_deadline(fake_bundle: Path, stage: str) -> None:
    async def main() -> None:
        stages = FakeStages(held=stage)
        async with serving(fake_bundle, stages) as pipeline:
            late = start(pipeline, timeout_ms=20)
            await stages.entered.wait()
            running_clock().advance(0.02)
            with pytest.raises(DeadlineExceeded, match="timeout_ms of 20"):
                await late
            assert_free(pipeline)
            stages.release.set()
            assert (await completed(pipeline, timeout_ms=60_000)).images

    run(main)


def test_what_could_not_be_finished_in_time_is_refused_at_once(fake_bundle: Path) -> None:
    stages = FakeStages()

    async def main() -> None:
        async with serving(fake_bundle, stages) as pipeline:
            await completed(pipeline)  # to an idle server nothing is known of, or everything is taken
            stages.held = "denoise"
            long = asyncio.create_task(completed(pipeline, steps=20))
            await stages.entered.wait()
            for _ in range(50):  # as if calls took so long of late
                pipeline._admission.calls.observe(4 * 8 * 6 * 2, 1.0)
            with pytest.raises(QueueFull, match="would not be finished within its timeout_ms") as caught:
                await draw(pipeline, timeout_ms=1000)
            assert 1 < caught.value.retry_after_s < 60
            assert pipeline.stats.total("requests_refused") == 1
            others = [asyncio.create_task(completed(pipeline, timeout_ms=ms)) for ms in (0, 3_600_000)]
            stages.held = ""
            stages.release.set()
            assert all(done.images for done in await asyncio.gather(long, *others))
            assert not len(pipeline._ledger)

    run(main)


def test_what_is_accepted_is_told_as_the_loop_takes_it(fake_bundle: Path) -> None:
    async def main() -> None:
        limits = replace(Limits.for_model(MODEL), max_prompt_chunks=3)
        async with serving(fake_bundle, FakeStages(), limits) as pipeline:
            for fields in (
                {"prompt": "a"},
                {"prompt": "a BREAK b", "num_images": 3},
                {"prompt": "a", "negative_prompt": "a BREAK b BREAK c", "num_images": 2},
                {"prompt": "a", "negative_prompt": "a BREAK b", "guidance_scale": 1},
            ):
                events = pipeline.generate(make_request(**fields, progress=True))
                assert isinstance(await anext(events), Accepted)
                [entry] = pipeline._ledger
                assert isinstance(await anext(events), Progressed)
                [job] = pipeline._loop._active
                shapes = dict(job.batch_key.conditioning)
                assert (entry.shape, entry.images) == (job.shape, len(job.seeds))
                assert entry.chunks * MODEL.max_tokens == shapes["encoder_hidden_states"][0]
                assert entry.rows_per_image == job.rows_per_image
                await events.aclose()

    run(main)


@pytest.mark.parametrize("by", ["closing", "cancelling"])
@pytest.mark.parametrize("stage", STAGES)
def test_leaving_early_frees_everything(fake_bundle: Path, stage: str, by: str) -> None:
    async def main() -> None:
        stages = FakeStages(held=stage)
        async with serving(fake_bundle, stages) as pipeline:
            if by == "closing":
                events = pipeline.generate(make_request(num_images=3))
                assert await anext(events) == Accepted(3, 0)
                await stages.entered.wait()
                assert unanswered(pipeline) == 1
                await events.aclose()
            else:
                reader = start(pipeline, num_images=3)
                await stages.entered.wait()
                reader.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reader
            assert_free(pipeline)
            stages.release.set()
            assert (await completed(pipeline)).images

    run(main)


def test_closing_at_once(fake_bundle: Path) -> None:
    async def main() -> None:
        stages = FakeStages()
        async with serving(fake_bundle, stages) as pipeline:
            await pipeline.generate(make_request()).aclose()
            events = pipeline.generate(make_request())
            await anext(events)
            await events.aclose()
            assert_free(pipeline)
        assert stages.calls == []

    run(main)


@pytest.mark.parametrize("error", [StageFailed("broken"), ValueError("broken")], ids=["StageFailed", "ValueError"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_fails_one_request_only(fake_bundle: Path, stage: str, error: Exception) -> None:
    bad_ids = Tokenizer(fake_bundle / "tokenizer", MODEL.max_tokens).encode([("bad", 1.0)]).input_ids

    def fail(at: str, array: Any) -> None:
        if at == stage and (array.shape[-1] == 2 if stage != "encode_text" else (array == bad_ids).all()):
            raise error

    async def main() -> None:
        async with serving(fake_bundle, FakeStages(on_call=fail)) as pipeline:
            good = [start(pipeline, seed=seed, steps=5) for seed in range(2)]
            bad = start(pipeline, prompt="bad", width=16, steps=5)
            with pytest.raises((StageFailed, type(error)), match="broken"):
                await bad
            for events in await asyncio.gather(*good):
                assert isinstance(events[-1], Completed)

    run(main)


@pytest.mark.parametrize(
    "decoded",
    [
        lambda pixels: pixels.astype(np.float32),
        lambda pixels: pixels[:, :-1],
        lambda pixels: pixels[..., :1],
        lambda pixels: pixels[:1],
        lambda pixels: pixels.transpose(0, 3, 1, 2),
    ],
    ids=["dtype", "height", "channels", "count", "order"],
)
def test_wrong_decoder_output(fake_bundle: Path, decoded: Callable[[Any], Any]) -> None:
    class Stages(FakeStages):
        async def decode(self, latent_sample: Any) -> Any:
            pixels, finite = await super().decode(latent_sample)
            return decoded(pixels), finite

    async def main() -> None:
        async with serving(fake_bundle, Stages()) as pipeline:
            with pytest.raises(StageFailed, match=r"decoder returned .* where uint8 \(2, 48, 64, 3\) was expected"):
                await draw(pipeline, num_images=2)

    run(main)


def test_wrong_unet_output(fake_bundle: Path) -> None:
    class Stages(FakeStages):
        async def denoise(self, *args: Any) -> Any:
            return (await super().denoise(*args)) * np.float32(np.nan)

    async def main() -> None:
        async with serving(fake_bundle, Stages()) as pipeline:
            with pytest.raises(StageFailed, match="not finite"):
                await draw(pipeline)

    run(main)


@pytest.mark.parametrize(
    ("held", "stage"), [("encode_text", "text_encoder"), ("denoise", "unet"), ("decode", "vae_decoder")]
)
def test_a_stage_that_hangs_fails_its_requests(fake_bundle: Path, held: str, stage: str) -> None:
    async def main() -> None:
        stages = FakeStages(held=held)
        async with serving(fake_bundle, stages, call_timeout_s=5) as pipeline:
            hung = start(pipeline)
            await stages.entered.wait()
            running_clock().advance(5)
            with pytest.raises(StageFailed, match=f"The stage {stage} gave no answer in time; a call may take 5 s"):
                await hung

    run(main)


def test_the_queue_is_bounded(fake_bundle: Path) -> None:
    async def main() -> None:
        stages = FakeStages(held="denoise")
        limits = replace(Limits.for_model(MODEL), max_waiting_requests=2)
        async with serving(fake_bundle, stages, limits) as pipeline:
            waiting = [start(pipeline) for _ in range(2)]
            await stages.entered.wait()
            with pytest.raises(
                QueueFull, match=r"^2 requests of 4 rows are waiting, and no more are queued. Try again in"
            ) as full:
                await draw(pipeline)
            assert full.value.retry_after_s == 1.0  # no call has been measured yet
            assert unanswered(pipeline) == pipeline.gauges()["requests_waiting"] == 2
            stages.release.set()
            await asyncio.gather(*waiting)
            assert (await completed(pipeline)).images

            stages.release.clear()
            stages.entered.clear()
            waiting = [start(pipeline) for _ in range(2)]
            await stages.entered.wait()
            with pytest.raises(QueueFull) as full:
                await draw(pipeline)
            assert 0.1 <= full.value.retry_after_s <= 60
            stages.release.set()
            await asyncio.gather(*waiting)

    run(main)


def test_a_request_past_its_first_step_does_not_wait(fake_bundle: Path) -> None:
    async def main() -> None:
        stages = FakeStages(held="decode")
        limits = replace(Limits.for_model(MODEL), max_waiting_requests=1)
        async with serving(fake_bundle, stages, limits) as pipeline:
            first = start(pipeline)
            await stages.entered.wait()
            assert (unanswered(pipeline), pipeline.gauges()["requests_waiting"]) == (1, 0)
            second = start(pipeline)
            stages.release.set()
            await asyncio.gather(first, second)

    run(main)


def test_draining(fake_bundle: Path) -> None:
    async def main() -> None:
        stages = FakeStages(held="denoise")
        async with serving(fake_bundle, stages) as pipeline:
            accepted = start(pipeline)
            await stages.entered.wait()
            pipeline.drain()
            with pytest.raises(Draining, match="takes no new requests"):
                await draw(pipeline)
            assert unanswered(pipeline) == 1
            stages.release.set()
            assert isinstance((await accepted)[-1], Completed)

    run(main)


def test_closing_the_pipeline_fails_what_is_left(fake_bundle: Path) -> None:
    async def main() -> None:
        stages = FakeStages(held="denoise")
        pipeline = Pipeline(fake_bundle, stages)
        requests = [start(pipeline, width=width) for width in (16, 32)]
        await stages.entered.wait()
        await pipeline.close()
        for result in await asyncio.gather(*requests, return_exceptions=True):
            assert isinstance(result, StageFailed)
        assert_free(pipeline)

    run(main)


def test_too_few_rows_for_guidance(fake_bundle: Path) -> None:
    async def main() -> None:
        async with serving(fake_bundle, FakeStages(), replace(Limits.for_model(MODEL), max_rows=1)) as pipeline:
            with pytest.raises(StageFailed, match="Set it to 2 or more"):
                await draw(pipeline)
            assert (await completed(pipeline, guidance_scale=1, num_images=2)).images

    run(main)


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        Pipeline(tmp_path, FakeStages())
