from __future__ import annotations

from pathlib import Path

import pytest

from diffuserve.bundle.manifest import read_manifest
from diffuserve_bench.engine import save_unet_seconds
from diffuserve_bench.mixture import closed, kind_of
from diffuserve_bench.short import needed
from diffuserve_loadtest.engine_bound import bound_per_s
from diffuserve_loadtest.stage_seconds import StageSeconds, mean_of
from tests.core.fakes import MODEL, make_bundle

SECONDS = StageSeconds(
    text_encoder={1: 0.1, 16: 0.8}, unet={2: 0.2, 4: 0.3, 8: 0.9}, vae_decoder={1: 0.5, 2: 0.9, 16: 8.0}
)


def test_a_batch_is_its_stages_one_after_another() -> None:
    assert SECONDS.batch_s(images=1, steps=10) == pytest.approx(0.1 + 10 * 0.2 + 0.5)
    assert SECONDS.batch_s(images=2, steps=10) == pytest.approx(0.1 + 0.7 / 15 + 10 * 0.3 + 0.9)


def test_the_best_batch_need_not_be_the_largest() -> None:
    rate, batch = SECONDS.best_images_per_s(steps=10, max_rows=8)
    assert batch == 2
    assert rate == pytest.approx(2 / SECONDS.batch_s(2, 10))


def test_the_engines_bound_for_a_mixture() -> None:
    workload = closed([kind_of(10, (64, 48)), kind_of(10, (64, 48), guided=False)], 1)
    # A row in a call of 4, a text in a call of 16, an image in a call of 2.
    mean_s = 15 * 0.3 / 4 + 0.8 / 16 + 0.9 / 2
    assert bound_per_s(workload, MODEL, {(64, 48): SECONDS}, max_rows=8) == pytest.approx(1 / mean_s)


def test_a_short_request_needs_its_steps_at_the_full_budget() -> None:
    assert needed(SECONDS, steps=8, max_rows=8) == pytest.approx(8 * 0.9 + 0.1 + 0.5)


def test_the_mean_of_two_measurements() -> None:
    slower = StageSeconds({1: 0.3, 16: 1.0}, {2: 0.4, 4: 0.5, 8: 1.1}, {1: 0.7, 2: 1.1, 16: 9.0})
    mean = mean_of([SECONDS, slower])
    assert (mean.text_encoder[1], mean.unet[8], mean.vae_decoder[16]) == pytest.approx((0.2, 1.0, 8.5))


def test_saving_changes_the_manifests_figures_only(tmp_path: Path) -> None:
    before = make_bundle(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    save_unet_seconds(tmp_path, {1: 0.5, 2: 0.75})
    after = read_manifest(tmp_path)
    assert after.unet_seconds == {1: 0.5, 2: 0.75}
    assert after.bundle_sha256 == before.bundle_sha256
    assert after.components == before.components
    assert {path.name for path in tmp_path.iterdir()} == names
