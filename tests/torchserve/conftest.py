from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from diffuserve.torchserve.address import TorchServeAddress
from diffuserve.torchserve.keys import read_inference_token, read_token
from diffuserve.torchserve.launcher import TorchServeServer
from diffuserve_client import Client, TorchServe
from diffuserve_export.repository import archive as archives
from diffuserve_export.repository.archive import archive_from_bundle
from diffuserve_export.repository.torchserve_options import TorchServing
from tests.gate import Gate
from tests.waiting import LONG_S


@pytest.fixture(scope="module")
def worker_gate(tmp_path_factory: pytest.TempPathFactory) -> Gate:
    """The gate before the UNet of `archive`."""
    return Gate(tmp_path_factory.mktemp("gate"))


@pytest.fixture(scope="module")
def archive(bundle: Path, worker_gate: Gate, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of the bundled model."""
    return guarded_archive(bundle, worker_gate, tmp_path_factory.mktemp("mar"), TorchServing())


def guarded_archive(bundle: Path, gate: Gate, folder: Path, serving: TorchServing) -> Path:
    path = folder / "tiny-emoji.mar"
    with mock.patch.object(archives, "_HANDLER", gate.handler()):
        archive_from_bundle(bundle, path, torchserve=serving)
    return path


@pytest.fixture(scope="module")
def torchserve(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServeServer]:
    """A real TorchServe on the bundled model."""
    key_file = tmp_path_factory.mktemp("keys") / "keys.json"
    with TorchServeServer(archive, TorchServeAddress.on_free_ports(), key_file=key_file) as server:
        yield server


@pytest.fixture(scope="module")
def torchserve_client(torchserve: TorchServeServer) -> Iterator[Client]:
    token = read_inference_token(torchserve.key_file)
    with Client(torchserve.address.grpc, server=TorchServe(token)) as client:
        yield client


def queued(address: TorchServeAddress, key_file: Path) -> int:
    """Requests that TorchServe has and no worker."""
    request = urllib.request.Request(
        f"http://{address.host}:{address.management_port}/models/stable_diffusion",
        headers={"Authorization": f"Bearer {read_token(key_file, 'management')}"},
    )
    with urllib.request.urlopen(request, timeout=LONG_S) as response:
        [described] = json.load(response)
    found: int = described["jobQueueStatus"]["pendingRequests"]
    return found
