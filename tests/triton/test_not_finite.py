"""A real server whose VAE decoder overflows on some latents, as one in fp16 does: black images are never returned."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from diffuserve.bundle.checksums import describe_file
from diffuserve.bundle.manifest import read_manifest, write_manifest
from diffuserve.errors import StageFailed
from diffuserve.tensors import VAE_DECODER
from diffuserve.triton.address import TritonAddress
from diffuserve.triton.launcher import TritonServer
from diffuserve_client import Client, Result
from diffuserve_export.repository.assemble import repository_from_bundle
from tests.metrics import values
from tests.triton.test_http import post
from tests.waiting import wait_for

SEEDS = range(12)


def overflow_on_some(path: Path) -> None:
    """Changes a decoder's graph: whether its last convolution overflows depends on the row's own latents, of which it takes
    about half."""
    model = onnx.load(path)
    graph = model.graph
    [decoded] = {node.input[0] for node in graph.node if node.op_type == "IsInf"}
    [(at, last)] = [(at, node) for at, node in enumerate(graph.node) if decoded in node.output]
    last.output[0] = "right"
    for name, array in {
        "all_but_rows": np.array([1, 2, 3]),
        "hundred": np.array(100, np.float32),
        "zero": np.array(0, np.float32),
        "largest": np.array(3e38, np.float32),
    }.items():
        graph.initializer.append(numpy_helper.from_array(array, name))
    added = [
        helper.make_node("ReduceMean", ["latent_sample", "all_but_rows"], ["mean"], keepdims=1),
        helper.make_node("Mul", ["mean", "hundred"], ["angle"]),
        helper.make_node("Sin", ["angle"], ["sine"]),
        helper.make_node("Greater", ["sine", "zero"], ["chosen"]),
        helper.make_node("Where", ["chosen", "largest", "zero"], ["large"]),
        helper.make_node("Add", ["right", "large"], ["once"]),
        helper.make_node("Add", ["once", "large"], [decoded]),
    ]
    for node in reversed(added):
        graph.node.insert(at + 1, node)
    onnx.checker.check_model(model)
    onnx.save(model, path)


@pytest.fixture(scope="module")
def overflowing(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("overflowing")
    spoilt = Path(shutil.copytree(bundle, folder / "bundle", ignore=shutil.ignore_patterns("*.onnxruntime")))
    path = spoilt / VAE_DECODER / "model.onnx"
    overflow_on_some(path)
    manifest = read_manifest(spoilt)
    component = msgspec.structs.replace(manifest.components[VAE_DECODER], files=(describe_file(spoilt, path),))
    write_manifest(
        spoilt, msgspec.structs.replace(manifest, components={**manifest.components, VAE_DECODER: component})
    )
    repository_from_bundle(spoilt, folder / "repository")
    with TritonServer(folder / "repository", TritonAddress.on_free_ports()) as server:
        yield server


def test_images_that_are_not_finite_fail_alone(overflowing: TritonServer, client: Client) -> None:
    def draw(drawing: Client, seed: int) -> Result | StageFailed:
        try:
            return drawing.generate("a red heart, flat", steps=3, seed=seed)
        except StageFailed as error:
            return error

    def counted() -> list[float]:
        found = values(overflowing.address)
        return [found.get(name, 0) for name in ("images_not_finite", "requests_failed", "images")]

    before = counted()
    with (
        Client(overflowing.address.grpc) as other,
        ThreadPoolExecutor(len(SEEDS)) as pool,
    ):
        drawn = list(pool.map(lambda seed: draw(other, seed), SEEDS))
    failed = [outcome for outcome in drawn if isinstance(outcome, StageFailed)]
    assert 0 < len(failed) < len(SEEDS)
    for error in failed:
        assert "not finite for 1 of 1 images" in str(error)
        assert "heart" not in str(error)
    for seed, outcome in zip(SEEDS, drawn, strict=True):
        if isinstance(outcome, Result):
            right = client.generate("a red heart, flat", steps=3, seed=seed)
            difference = np.asarray(outcome.images[0]).astype(int) - np.asarray(right.images[0])
            assert abs(difference).max() <= 1  # in other company than there
    expected = [len(failed), len(failed), len(SEEDS) - len(failed)]
    wait_for(expected, lambda: [now - earlier for now, earlier in zip(counted(), before, strict=True)])


def test_over_http_the_code_says_whose_error_it_is(overflowing: TritonServer) -> None:
    status, text = post(overflowing, "generate", {"prompt": "a pear", "steps": 2, "seed": 3, "num_images": 12})
    assert status == 400  # as for all that the model itself answers, see docs/http.md
    assert "[stage_failed] The VAE decoder returned values that are not finite for" in text
