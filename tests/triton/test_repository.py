"""What a start accepts as a model repository."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from diffuserve.errors import BundleError, LaunchError
from diffuserve.tensors import STABLE_DIFFUSION, UNET, VAE_DECODER
from diffuserve.triton import launcher
from diffuserve.triton.address import Address
from diffuserve.triton.launcher import TritonServer
from diffuserve.triton.placement import PLACEMENT_NAME, described_placement, write_placement
from diffuserve.triton.repository import check_one_bundle, check_repository
from diffuserve_export.assemble import repository_from_bundle
from tests.core.fakes import make_bundle


@pytest.fixture
def assembled(tmp_path: Path) -> Path:
    make_bundle(tmp_path / "bundle")
    repository_from_bundle(tmp_path / "bundle", tmp_path / "repository")
    return tmp_path / "repository"


def give_another_bundle(repository: Path, name: str) -> None:
    """As if this model had come from another export of the same checkpoint."""
    folder = repository / name / "1"
    write_placement(folder, msgspec.structs.replace(described_placement(folder), bundle_sha256="5e" * 32))


def test_a_whole_repository_is_accepted(assembled: Path) -> None:
    check_repository(assembled)
    check_one_bundle(assembled, [UNET, VAE_DECODER, "in_another_repository"])


@pytest.mark.parametrize("name", [UNET, VAE_DECODER, STABLE_DIFFUSION])
def test_models_of_different_bundles_are_named(assembled: Path, name: str) -> None:
    own = described_placement(assembled / UNET / "1").bundle_sha256[:10]
    give_another_bundle(assembled, name)
    with pytest.raises(BundleError, match=r"are of different bundles: .*diffuserve assemble BUNDLE") as caught:
        check_repository(assembled)
    for folder in assembled.iterdir():
        expected = "5e5e5e5e5e" if folder.name == name else own
        assert f"{folder.name} of {expected}" in str(caught.value)


def test_a_model_that_was_not_finished_is_named(assembled: Path) -> None:
    (assembled / UNET / "1" / PLACEMENT_NAME).unlink()
    for check in (check_repository, lambda repository: check_one_bundle(repository, [UNET])):
        with pytest.raises(BundleError, match="unet/1 holds no engine"):
            check(assembled)


def test_a_triton_that_the_launcher_did_not_check_refuses_them_too(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(repository, tmp_path / "repository")
    give_another_bundle(tmp_path / "repository", VAE_DECODER)
    monkeypatch.setattr(launcher, "check_repository", lambda repository: None)
    with (
        pytest.raises(LaunchError, match=r"are of different bundles: .*vae_decoder of 5e5e5e5e5e"),
        TritonServer(tmp_path / "repository", Address.on_free_ports()),
    ):
        pass
