"""What an engine has been called with before anybody waits for it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from diffuserve.engines.example_inputs import Arrays
from diffuserve.engines.warm import warm
from diffuserve.stages import ArraysByName
from diffuserve.tensors import UNET
from tests.core.tiny_graphs import make_real_bundle


class Calls:
    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, inputs: ArraysByName) -> Arrays:
        self.shapes.append(inputs["sample"].shape)
        return {}


@pytest.mark.parametrize("engine", ["onnxruntime-cuda", "tensorrt"])
def test_a_gpu_runs_each_power_of_two_twice_at_the_native_size(tmp_path: Path, engine: str) -> None:
    manifest, calls = make_real_bundle(tmp_path), Calls()
    component = msgspec.structs.replace(manifest.components[UNET], engine=engine)
    warm(calls, component, manifest.model, 12)
    height, width = (size // manifest.model.vae_scale_factor for size in (manifest.model.height, manifest.model.width))
    assert calls.shapes == [(rows, 4, height, width) for rows in (1, 1, 2, 2, 4, 4, 8, 8)]
    calls.shapes.clear()
    warm(calls, component, manifest.model, 16)
    assert [shape[0] for shape in calls.shapes] == [1, 1, 2, 2, 4, 4, 8, 8, 16, 16]


def test_a_cpu_runs_two_small_batches(tmp_path: Path) -> None:
    manifest, calls = make_real_bundle(tmp_path), Calls()
    warm(calls, manifest.components[UNET], manifest.model, 32)
    side = manifest.model.size_multiple // manifest.model.vae_scale_factor
    assert calls.shapes == [(rows, 4, side, side) for rows in (1, 2)]
