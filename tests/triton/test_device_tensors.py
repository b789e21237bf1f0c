"""PyTorch's tensors between Triton's models, on a real server: the CPU's, with which the same calls of Triton work."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from diffuserve.bundle.manifest import read_manifest
from diffuserve.tensors import STABLE_DIFFUSION, UNET
from diffuserve.triton.address import TritonAddress
from diffuserve.triton.launcher import TritonServer
from diffuserve_client import Client
from diffuserve_export.repository.assemble import repository_from_bundle

_ROOT = Path(__file__).parents[2]
_HEAD = """
import sys

sys.path.insert(0, {root!r})

from pathlib import Path

import torch
from torch.utils.dlpack import from_dlpack

from diffuserve.triton import bls_stages, device_tensors, stable_diffusion, stage
from tests.core.torch_facade import TorchFacade

FOLDER = Path({folder!r})


def note(name, what):
    with (FOLDER / name).open("a") as file:
        print(what, file=file)
"""
# A UNet that gets what it would on a GPU: tensors, whatever the memory.
_UNET = """

class TritonPythonModel(stage.StageModel):
    def initialize(self, args):
        super().initialize(args)
        self._engine = TorchFacade(self._engine)
        stage.from_triton = lambda tensor: from_dlpack(tensor.to_dlpack())

    def execute(self, requests):
        responses = super().execute(requests)
        note("engine", "tensors" if self._engine.kinds[-1] else "arrays")
        return responses
"""
# A loop that believes that such a UNet's device is the CPU. While `refuse` exists no tensor can be handed on.
_INFLIGHT = """

def refused():
    return (FOLDER / "refuse").exists()


def to_triton(name, array):
    if name == "sample":
        note("sent", "tensor" if isinstance(array, torch.Tensor) else "array")
    if isinstance(array, torch.Tensor) and refused():
        raise RuntimeError("no memory is handed on")
    return device_tensors.to_triton(name, array)


def from_triton(tensor):
    if tensor.name() == "noise_pred" and not refused():
        return from_dlpack(tensor.to_dlpack())
    return device_tensors.from_triton(tensor)


stable_diffusion.device_for = lambda component: torch.device("cpu")
bls_stages.to_triton, bls_stages.from_triton = to_triton, from_triton
TritonPythonModel = stable_diffusion.StableDiffusionModel
"""


def test_tensors_go_to_the_unet_and_back_or_by_way_of_the_host(bundle: Path, tmp_path: Path, client: Client) -> None:
    repository = tmp_path / "repository"
    repository_from_bundle(bundle, repository)
    head = _HEAD.format(root=str(_ROOT), folder=str(tmp_path))
    for model, code in ((UNET, _UNET), (STABLE_DIFFUSION, _INFLIGHT)):
        (repository / model / "1" / "model.py").write_text(head + code)
    requests: list[dict[str, Any]] = [
        {"prompt": "a red apple", "seed": 4, "steps": 3, "sampler": "dpmpp_2m", "guidance_scale": 4.0},
        {"prompt": "a blue car", "seed": 5, "steps": 4, "sampler": "euler_a", "guidance_scale": 1.0, "num_images": 2},
    ]

    def noted(name: str) -> list[str]:
        return (tmp_path / name).read_text().split()

    def drawn(by: Client) -> list[Any]:
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(lambda request: by.generate(**request, width=64, height=64), requests))
        return [np.asarray(image).astype(int) for result in results for image in result.images]

    expected = drawn(client)
    with TritonServer(repository, TritonAddress.on_free_ports()) as server, Client(server.address.grpc) as by_tensors:
        handed = drawn(by_tensors)
        assert set(noted("sent")) == {"tensor"}
        assert set(noted("engine")) == {"tensors"}
        steps = len(noted("sent"))
        (tmp_path / "refuse").touch()
        copied = drawn(by_tensors)
        assert noted("sent")[steps : steps + 2] == ["tensor", "array"]
        assert set(noted("sent")[steps + 1 :]) == {"array"}  # nothing is tried in vain again
    for images in (handed, copied):
        assert len(images) == len(expected) == 3
        for image, reference in zip(images, expected, strict=True):
            assert np.abs(image - reference).max() <= 2


@pytest.fixture
def device_tensors(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, outside of Triton's processes, where alone there is Triton's."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", ModuleType("triton_python_backend_utils"))
    yield importlib.import_module("diffuserve.triton.device_tensors")
    for name in ("device_tensors", "log", "stage"):
        sys.modules.pop(f"diffuserve.triton.{name}", None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_process_that_cannot_use_the_gpu_keeps_latents_on_the_host(
    bundle: Path, device_tensors: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    unet = read_manifest(bundle).components[UNET]
    assert device_tensors.device_for(unet) is None
    assert not caplog.records
    assert device_tensors.device_for(msgspec.structs.replace(unet, engine="torch-cuda")) is None
    assert "PyTorch cannot use the GPU in this process" in caplog.text


def test_rows_of_several_requests_are_joined_where_the_first_are(device_tensors: ModuleType) -> None:
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    parts = rows[:1], torch.from_numpy(rows[1:3]), rows[3:]
    assert device_tensors.joined(parts[:1]) is parts[0]
    of_arrays, of_tensors = device_tensors.joined(parts), device_tensors.joined(parts[1:])
    assert isinstance(of_tensors, torch.Tensor)
    np.testing.assert_array_equal(of_arrays, rows)
    np.testing.assert_array_equal(of_tensors.numpy(), rows[1:])


def test_a_gpu_that_hangs_ends_the_stages_process(device_tensors: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine returns tensors of a GPU before they are made; who waits for them is watched as well."""
    stage = importlib.import_module("diffuserve.triton.stage")
    monkeypatch.setattr(stage.pb_utils, "InferenceResponse", list, raising=False)
    watched: list[str] = []
    monkeypatch.setattr(stage.faulthandler, "dump_traceback_later", lambda *_, **__: watched.append("begins"))
    monkeypatch.setattr(stage.faulthandler, "cancel_dump_traceback_later", lambda: watched.append("ends"))
    monkeypatch.setattr(stage, "to_triton", lambda name, array: watched.append(f"{len(array)} rows of {name}"))
    model = stage.StageModel()
    model._call_timeout_s = 1.0
    model._tensors = SimpleNamespace(inputs=[SimpleNamespace(name="x")])
    model._engine = lambda inputs: {"y": inputs["x"]}
    model._run([{"x": np.ones((1, 2))}, {"x": np.ones((3, 2))}])
    assert watched == ["begins", "1 rows of y", "3 rows of y", "ends"]
