"""Fixtures that several packages' tests share."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

import diffuserve.serving.address
import diffuserve_loadtest.sending.generator
from diffuserve.triton.address import TritonAddress
from diffuserve.triton.launcher import TritonServer
from diffuserve_client import AsyncClient, Client
from tests.families import FAMILIES, Family, make_family
from tests.gate import Gate
from tests.metrics import waiting_and_running
from tests.ports import reserved_ports
from tests.waiting import LONG_S, wait_for

# PyTorch in one thread, here and in what is started: the cores are for the other worker and for servers. Set before its import.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TESTS = Path(__file__).parent
MODEL_STORE = TESTS.parent / "model_store"
CHECKPOINT = MODEL_STORE / "checkpoints" / "tiny-emoji"


# Tests whose files take long. Workers are given a file at a time, so short ones have to come last for all of them to be busy to the
# end; and first what makes the export that others wait for.
LONG_FIRST = (
    "export/test_bundle_writing.py",
    "training",
    "triton",
    "torchserve",
    "loadtest",
    "bench",
    "faults",
    "export",
)


def pytest_configure(config: pytest.Config) -> None:
    """Ctrl-C works in the programs under test even where a shell started the tests in the background, whose children
    inherit that it is ignored. No property test is judged by its time. PyTorch's compiler, which makes a folder when it is
    imported, leaves none; the engine torch compiles where a test is about that, since it takes half a minute."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    compiled = tempfile.TemporaryDirectory(prefix="diffuserve-tests-")
    config.add_cleanup(compiled.cleanup)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled.name
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any speed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """As `LONG_FIRST` says."""

    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(TESTS).as_posix()
        return next((at for at, start in enumerate(LONG_FIRST) if path.startswith(start)), len(LONG_FIRST))

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def own_ports() -> Iterator[None]:
    """Servers that are started on free ports find them free when they have loaded."""
    with (
        mock.patch.object(diffuserve.serving.address, "free_ports", reserved_ports),
        mock.patch.object(diffuserve_loadtest.sending.generator, "free_ports", reserved_ports),
    ):
        yield


@pytest.fixture(scope="session", autouse=True)
def patient_clients() -> Iterator[None]:
    """On a busy machine a server may take longer than a second to take a connection."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (Client, AsyncClient):
            patch.setitem(kind.__init__.__kwdefaults__, "connect_timeout_s", LONG_S)  # type: ignore[misc]
        yield


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Makes a folder that all workers share: `once(name, make)` gives a folder in which `make` has made what it makes, called
    by whichever worker asks first. No test may change what is in it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder, made = shared / f"shared-{name}", shared / f"shared-{name}.made"
        with FileLock(shared / f"shared-{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def bundle(once: Once) -> Path:
    """The bundled checkpoint's bundle; exported first if it is missing or out of date, which takes a minute or two."""
    from diffuserve_export.export import bundle_from_checkpoint

    path = MODEL_STORE / "bundles" / "tiny-emoji"
    once("bundle", lambda _: bundle_from_checkpoint(CHECKPOINT, path))
    return path


@pytest.fixture(scope="session")
def repository(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository that serves the bundled model."""
    from diffuserve_export.repository.assemble import repository_from_bundle

    folder = tmp_path_factory.mktemp("repository")
    repository_from_bundle(bundle, folder)
    return folder


@pytest.fixture(scope="session")
def servers_gate(tmp_path_factory: pytest.TempPathFactory) -> Gate:
    return Gate(tmp_path_factory.mktemp("gate"))


@pytest.fixture(scope="session")
def server(repository: Path, servers_gate: Gate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A real Triton on the bundled model, one for the whole session."""
    guarded = Path(shutil.copytree(repository, tmp_path_factory.mktemp("server") / "repository"))
    servers_gate.guard(guarded)
    with TritonServer(guarded, TritonAddress.on_free_ports()) as server:
        yield server


@pytest.fixture
def gate(server: TritonServer, servers_gate: Gate) -> Gate:
    """The gate before the UNet of `server`, which has nothing left to do."""
    wait_for([0, 0], lambda: waiting_and_running(server.address))
    return servers_gate


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
