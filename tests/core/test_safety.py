"""The pipeline over a bundle with a safety checker: what is withheld, and that nothing unchecked gets out."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from diffuserve.bundle.manifest import Manifest, read_manifest, write_manifest
from diffuserve.errors import BundleError, DeadlineExceeded, StageFailed
from diffuserve.events import Completed, Progressed
from diffuserve.images.safety import flagged_from_scores
from diffuserve.limits import MAX_DECODE_BATCH
from diffuserve.serving_options import Serving
from diffuserve.stages import Float32
from diffuserve.triton.responses import tensors_from_event
from tests.clocks import running_clock
from tests.core.fakes import FakeStages, make_bundle
from tests.core.test_pipeline import completed, draw, make_request, serving, start
from tests.core.tidy import run


@pytest.fixture(scope="module")
def checked_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("bundle")
    make_bundle(folder, safety_checker=True)
    return folder


@pytest.fixture(scope="module")
def plain_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("bundle")
    make_bundle(folder)
    return folder


def redder_than(share: float) -> Callable[[Float32], bool]:
    return lambda clip_input: float(clip_input[0].mean()) > share


@pytest.mark.parametrize("format", ["png", "raw"])
def test_a_flagged_image_is_black_and_its_neighbours_are_as_they_were(
    checked_bundle: Path, plain_bundle: Path, format: str
) -> None:
    async def main() -> None:
        count = MAX_DECODE_BATCH + 2
        fields = {"num_images": count, "format": format}
        async with serving(plain_bundle, FakeStages()) as pipeline:
            expected = await completed(pipeline, **fields)
            assert expected.flagged == (False,) * count
            assert pipeline.stats.total("images_withheld") == 0
        redness = [2 * float(image[..., 0].mean()) / 255 - 1 for image in expected.pixels]
        stages = FakeStages(unsafe=redder_than(float(np.median(redness))))
        async with serving(checked_bundle, stages, require_safety_checker=True) as pipeline:
            done = await completed(pipeline, **fields)
            assert sorted(stages.rows("score_concepts")) == [2, MAX_DECODE_BATCH]
            assert (pipeline.stats.total("images"), pipeline.stats.total("images_withheld")) == (
                count,
                sum(done.flagged),
            )
        assert 0 < sum(done.flagged) < count
        for at, flagged in enumerate(done.flagged):
            assert done.pixels[at].any() != flagged
            if format == "raw":
                assert done.images[at] == done.pixels[at].tobytes()
            if flagged:
                with Image.open(io.BytesIO(done.images[at])) if format == "png" else Image.new("RGB", (1, 1)) as image:
                    assert image.getextrema() == ((0, 0),) * 3
            else:
                assert done.images[at] == expected.images[at]
        assert done.parameters == expected.parameters
        numbers = ", ".join(str(at + 1) for at, flagged in enumerate(done.flagged) if flagged)
        [warning] = done.warnings
        assert warning.startswith(f"The safety checker withheld {sum(done.flagged)} of {count} images")
        assert f"number {numbers}." in warning
        tensors = tensors_from_event(done, make_request(**fields))
        assert tensors["flagged"].dtype == bool
        assert tuple(tensors["flagged"].tolist()) == done.flagged

    run(main)


def test_nothing_flagged_is_no_warning(checked_bundle: Path) -> None:
    async def main() -> None:
        async with serving(checked_bundle, FakeStages()) as pipeline:
            done = await completed(pipeline, num_images=2)
            assert (done.flagged, done.warnings) == ((False, False), ())

    run(main)


def test_previews_are_dropped_with_a_warning(checked_bundle: Path) -> None:
    async def main() -> None:
        async with serving(checked_bundle, FakeStages()) as pipeline:
            *events, done = await draw(pipeline, steps=4, progress=True, preview=1)
            steps = [event for event in events if isinstance(event, Progressed)]
            assert [step.previews for step in steps] == [()] * 4
            assert isinstance(done, Completed)
            assert [warning.startswith("No previews were sent") for warning in done.warnings] == [True]

    run(main)


@pytest.mark.parametrize("error", [StageFailed("broken"), ValueError("broken")], ids=["StageFailed", "ValueError"])
def test_a_checker_that_fails_fails_its_request_only(checked_bundle: Path, error: Exception) -> None:
    def fail(stage: str, array: Any) -> None:
        if stage == "score_concepts" and len(array) == 2:
            raise error

    async def main() -> None:
        stages = FakeStages(on_call=fail)
        async with serving(checked_bundle, stages) as pipeline:
            good, bad = start(pipeline, seed=1), start(pipeline, seed=2, num_images=2)
            with pytest.raises(StageFailed, match="broken"):
                await bad
            assert isinstance((await good)[-1], Completed)

    run(main)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda scores: scores * np.float32(np.nan),
        lambda scores: np.where(np.arange(17) == 5, -np.inf, scores),
        lambda scores: scores[:1],
        lambda scores: scores[:, :16],
    ],
    ids=["not a number", "infinite", "count", "concepts"],
)
def test_an_answer_that_cannot_be_trusted_fails_the_request(checked_bundle: Path, spoil: Callable[[Any], Any]) -> None:
    class Stages(FakeStages):
        async def score_concepts(self, clip_input: Any) -> Any:
            return spoil(await super().score_concepts(clip_input))

    async def main() -> None:
        async with serving(checked_bundle, Stages()) as pipeline:
            with pytest.raises(StageFailed, match=r"safety checker returned .* finite numbers \(2, 17\) were expected"):
                await draw(pipeline, num_images=2)

    run(main)


def test_a_checker_that_hangs(checked_bundle: Path) -> None:
    async def main() -> None:
        stages = FakeStages(held="score_concepts")
        async with serving(checked_bundle, stages, call_timeout_s=5) as pipeline:
            hung = start(pipeline)
            await stages.entered.wait()
            running_clock().advance(5)
            with pytest.raises(StageFailed, match="safety_checker gave no answer in time"):
                await hung
        stages = FakeStages(held="score_concepts")
        async with serving(checked_bundle, stages) as pipeline:
            late = start(pipeline, timeout_ms=20)
            await stages.entered.wait()
            running_clock().advance(0.02)
            with pytest.raises(DeadlineExceeded):
                await late
            stages.entered.clear()
            reader = start(pipeline)
            await stages.entered.wait()
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader

    run(main)


def test_scores_count_to_three_decimals() -> None:
    scores = np.full((4, 17), -1, np.float32)
    scores[:, 7] = [0.0004, 0.0006, 0.0, -0.0004]
    assert flagged_from_scores(scores).tolist() == [False, True, False, False]


def edited(folder: Path, **changes: Any) -> Manifest:
    return msgspec.structs.replace(read_manifest(folder), **changes)


@pytest.mark.parametrize(("left_out", "fix"), [(True, "without --no-safety-checker"), (False, "carried none")])
def test_a_required_checker_that_is_missing(tmp_path: Path, left_out: bool, fix: str) -> None:
    from diffuserve.pipeline import Pipeline

    make_bundle(tmp_path, safety_checker_left_out=left_out)
    with pytest.raises(BundleError, match=f"fake has no safety checker, and one is required.*{fix}"):
        Pipeline(tmp_path, FakeStages(), serving=Serving(require_safety_checker=True))


def test_a_manifest_that_lost_half_of_it_is_damaged(checked_bundle: Path, tmp_path: Path) -> None:
    text = (checked_bundle / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace('"safety_checker": {', '"another": {'))
    with pytest.raises(BundleError, match=r"is damaged: .*safety checker"):
        read_manifest(tmp_path)
    with pytest.raises(ValueError, match="belong together"):
        write_manifest(tmp_path, edited(checked_bundle, image_processor=None))
