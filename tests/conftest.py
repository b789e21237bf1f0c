"""Fixtures that several packages' tests share."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffuserve.triton.address import TritonAddress
from diffuserve.triton.launcher import TritonServer
from diffuserve_client import Client
from tests.families import FAMILIES, Family, make_family

MODEL_STORE = Path(__file__).parents[1] / "model_store"
CHECKPOINT = MODEL_STORE / "checkpoints" / "tiny-emoji"


def pytest_configure() -> None:
    """Ctrl-C works in the programs under test even where a shell started the tests in the background, whose children
    inherit that it is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def bundle() -> Path:
    """The bundled checkpoint's bundle; exported first if it is missing or out of date, which takes a minute or two."""
    from diffuserve_export.export import bundle_from_checkpoint

    return bundle_from_checkpoint(CHECKPOINT, MODEL_STORE / "bundles" / "tiny-emoji")


@pytest.fixture(scope="session")
def repository(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository that serves the bundled model."""
    from diffuserve_export.repository.assemble import repository_from_bundle

    folder = tmp_path_factory.mktemp("repository")
    repository_from_bundle(bundle, folder)
    return folder


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[TritonServer]:
    """A real Triton on the bundled model, one for the whole session."""
    with TritonServer(repository, TritonAddress.on_free_ports()) as server:
        yield server


@pytest.fixture(scope="session")
def client(server: TritonServer) -> Iterator[Client]:
    """A client of that server."""
    with Client(server.address.grpc) as client:
        yield client


@pytest.fixture(scope="session")
def reference_pipeline() -> Any:
    """diffusers' own pipeline on the bundled checkpoint, fp32, quiet."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(CHECKPOINT, dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(
    scope="session",
    # Each is a whole export.
    params=[pytest.param(name, marks=[pytest.mark.slow, pytest.mark.timeout(900)]) for name in FAMILIES],
)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Each of the families beyond Stable Diffusion 1."""
    return make_family(request.param, tmp_path_factory.mktemp(request.param))
