from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from diffuserve.torchserve.address import TorchServeAddress
from diffuserve.torchserve.keys import read_inference_token
from diffuserve.torchserve.launcher import TorchServeServer
from diffuserve_client import Client, TorchServe
from diffuserve_export.repository.archive import archive_from_bundle
from diffuserve_export.repository.torchserve_options import TorchServing


@pytest.fixture(scope="session")
def archive(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of the bundled model; requests have half a second to come together."""
    path = tmp_path_factory.mktemp("mar") / "tiny-emoji.mar"
    archive_from_bundle(bundle, path, torchserve=TorchServing(max_batch_delay_ms=500))
    return path


@pytest.fixture(scope="module")
def torchserve(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServeServer]:
    """A real TorchServe on the bundled model."""
    key_file = tmp_path_factory.mktemp("keys") / "keys.json"
    with TorchServeServer(archive, TorchServeAddress.on_free_ports(), key_file=key_file) as server:
        yield server


@pytest.fixture(scope="module")
def torchserve_client(torchserve: TorchServeServer) -> Iterator[Client]:
    with Client(torchserve.address.grpc, server=TorchServe(read_inference_token(torchserve.key_file))) as client:
        yield client
