"""Calls of a stage that runs a TensorRT plan, on a real server whose UNet only claims to be one: of more rows than a profile
allows they are made in pieces."""

from __future__ import annotations

from pathlib import Path

import msgspec

from diffuserve.bundle.file_samples import sample_file
from diffuserve.bundle.manifest import read_manifest, write_manifest
from diffuserve.tensors import STABLE_DIFFUSION, UNET
from diffuserve.trials.similarity import psnr_db
from diffuserve.triton.address import TritonAddress
from diffuserve.triton.launcher import TritonServer
from diffuserve.triton.placement import read_placement, write_placement
from diffuserve_client import Client
from diffuserve_export.repository.assemble import repository_from_bundle
from tests.metrics import read_metrics
from tests.waiting import wait_for


def claim_a_plan(version_folder: Path) -> None:
    """Changes what the in-flight model reads of the UNet, and nothing of the UNet."""
    manifest, placement = read_manifest(version_folder), read_placement(version_folder)
    unet = msgspec.structs.replace(manifest.components[UNET], engine="tensorrt")
    write_manifest(version_folder, msgspec.structs.replace(manifest, components={**manifest.components, UNET: unet}))
    files = tuple(sample_file(version_folder, version_folder / file.name) for file in placement.files)
    write_placement(version_folder, msgspec.structs.replace(placement, files=files))


def test_calls_of_large_images_are_made_in_pieces(bundle: Path, tmp_path: Path, client: Client) -> None:
    repository_from_bundle(bundle, tmp_path)
    claim_a_plan(tmp_path / STABLE_DIFFUSION / "1")
    native = read_manifest(bundle).model
    request = {"prompt": "an apple", "seed": 4, "steps": 1, "sampler": "euler", "num_images": 10, "format": "raw"}
    with TritonServer(tmp_path, TritonAddress.on_free_ports()) as server, Client(server.address.grpc) as pieces:

        def calls_and_rows() -> list[float]:
            """As Triton counts them, a moment after their answers."""
            metrics = read_metrics(server.address.metrics)
            return [metrics["nv_inference_exec_count", UNET], metrics["nv_inference_count", UNET]]

        assert calls_and_rows() == [0, 0]
        # 20 rows, of which a profile for images of up to twice the side allows 8, and that of the native size 32.
        sizes = {"width": 2 * native.width, "height": native.height}
        wide = pieces.generate(**request, **sizes).images
        wait_for([3, 20], calls_and_rows)
        pieces.generate(**request)
        wait_for([4, 40], calls_and_rows)
    for image, reference in zip(wide, client.generate(**request, **sizes).images, strict=True):
        assert psnr_db(image, reference) >= 50
