"""A real server on a model with a safety checker: what it withholds, and that it answers nothing unchecked."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from diffuserve.bundle.checksums import describe_file
from diffuserve.bundle.manifest import Component, read_manifest, write_manifest
from diffuserve.errors import LaunchError
from diffuserve.serving_options import Serving
from diffuserve.triton.address import TritonAddress
from diffuserve.triton.launcher import TritonServer
from diffuserve_client import Client, LocalClient, Progress, Result
from diffuserve_export.checkpoint.checkpoint import open_checkpoint
from diffuserve_export.checkpoint.load import model_from_checkpoint
from diffuserve_export.graphs.modules import modules_from_model
from diffuserve_export.graphs.onnx import onnx_from_module
from diffuserve_export.repository.assemble import repository_from_bundle
from tests.conftest import CHECKPOINT
from tests.export.tiny import add_safety_checker
from tests.gate import Gate
from tests.metrics import counted
from tests.triton.test_http import post
from tests.triton.test_lifecycle import process_of

REQUEST = {"prompt": "a slice of pizza", "seed": 7, "steps": 2, "num_images": 6}


@dataclass(frozen=True)
class Checked:
    """`unchecked`: what `REQUEST` draws without a safety checker, some of which this server's withholds; `gate` is before its
    UNet."""

    bundle: Path
    server: TritonServer
    client: Client
    gate: Gate
    unchecked: Result


@pytest.fixture(scope="module")
def checked(bundle: Path, client: Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checked]:
    unchecked = client.generate(**REQUEST)  # type: ignore[arg-type]
    folder = tmp_path_factory.mktemp("checked")
    checkpoint = Path(shutil.copytree(CHECKPOINT, folder / "checkpoint"))
    add_safety_checker(checkpoint, [np.asarray(image) for image in unchecked.images])
    checked_bundle = Path(shutil.copytree(bundle, folder / "bundle"))
    add_component(checked_bundle, checkpoint)
    repository_from_bundle(checked_bundle, folder / "repository", serving=Serving(require_safety_checker=True))
    gate = Gate(folder)
    gate.guard(folder / "repository")
    with (
        TritonServer(folder / "repository", TritonAddress.on_free_ports()) as server,
        Client(server.address.grpc) as own,
    ):
        yield Checked(checked_bundle, server, own, gate, unchecked)


def add_component(bundle: Path, checkpoint: Path) -> None:
    """Exports the checkpoint's safety checker alone, since the rest is there."""
    opened = open_checkpoint(checkpoint)
    tensors = opened.tensors["safety_checker"]
    path = bundle / "safety_checker" / "model.onnx"
    path.parent.mkdir()
    module = modules_from_model(model_from_checkpoint(opened), opened.spec)["safety_checker"]
    onnx_from_module(module, "safety_checker", tensors, opened.spec, path)
    component = Component("onnxruntime", "fp32", (describe_file(bundle, path),), tensors, 1e-4, ())
    manifest = read_manifest(bundle)
    components = {**manifest.components, "safety_checker": component}
    write_manifest(
        bundle, msgspec.structs.replace(manifest, components=components, image_processor=opened.image_processor)
    )


def assert_withheld(result: Result, unchecked: Result) -> None:
    assert 0 < sum(result.flagged) < len(result.flagged) == len(unchecked.images)
    for image, plain, flagged in zip(result.images, unchecked.images, result.flagged, strict=True):
        if flagged:
            assert image.getextrema() == ((0, 0),) * 3
        else:
            np.testing.assert_array_equal(np.asarray(image), np.asarray(plain))
    [warning] = (warning for warning in result.warnings if "withheld" in warning)
    assert warning.startswith(f"The safety checker withheld {sum(result.flagged)} of {len(result.flagged)} images")


def test_flagged_images_are_black_and_the_others_as_they_were(checked: Checked) -> None:
    def withheld() -> float:
        return counted(checked.server.address, checked.client, checked.gate)["images_withheld"]

    before = withheld()
    idle = withheld()  # what counting itself adds
    result = checked.client.generate(**REQUEST)  # type: ignore[arg-type]
    assert withheld() - idle - (idle - before) == sum(result.flagged)
    assert_withheld(result, checked.unchecked)
    assert checked.unchecked.flagged == [False] * len(result.flagged)


def test_in_the_clients_own_process_too(checked: Checked) -> None:
    with LocalClient(checked.bundle) as local:
        result = local.generate(**REQUEST)  # type: ignore[arg-type]
    assert_withheld(result, checked.unchecked)


def test_http_says_so(checked: Checked) -> None:
    status, text = post(checked.server, "generate", REQUEST)
    assert status == 200
    answer = json.loads(text)
    assert 0 < sum(answer["flagged"]) < len(answer["flagged"])
    for flagged, data in zip(answer["flagged"], answer["image"], strict=True):
        assert isinstance(flagged, bool)
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert (image.getextrema() == ((0, 0),) * 3) == flagged
    # No field of a request can turn it off.
    status, text = post(checked.server, "generate", {**REQUEST, "safety_checker": False})
    assert status == 400
    assert "Unknown: 'safety_checker'" in text


def test_previews_are_dropped(checked: Checked) -> None:
    *steps, result = checked.client.stream("a rocket", steps=3, preview=True)
    assert [step.encoded_previews for step in steps if isinstance(step, Progress)] == [[]] * 4
    assert isinstance(result, Result)
    assert any(warning.startswith("No previews were sent") for warning in result.warnings)


def test_a_dead_checker_is_loaded_again_and_nothing_passes_unchecked(checked: Checked) -> None:
    killed = process_of("safety_checker", checked.server.pid)
    killed.kill()
    result = checked.client.generate(**REQUEST)  # type: ignore[arg-type]
    assert process_of("safety_checker", checked.server.pid).pid != killed.pid
    assert_withheld(result, checked.unchecked)


def test_without_the_required_checker_the_model_does_not_load(
    bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As when somebody puts another bundle's manifest in place, whatever `assemble` refused."""
    repository_from_bundle(bundle, tmp_path)
    config = tmp_path / "stable_diffusion" / "config.pbtxt"
    entry = r'(key: "require_safety_checker"\n  value {\n    string_value: )"False"'
    config.write_text(re.sub(entry, r'\1"True"', config.read_text()))
    with pytest.raises(LaunchError), TritonServer(tmp_path, TritonAddress.on_free_ports()):
        pass
    assert "has no safety checker, and one is required" in "".join(capfd.readouterr())
