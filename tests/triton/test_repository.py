"""What a start accepts as a model repository."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from diffuserve.bundle.manifest import FusedLora, read_manifest, write_manifest
from diffuserve.errors import BundleError, LaunchError
from diffuserve.tensors import STABLE_DIFFUSION, UNET, VAE_DECODER
from diffuserve.triton import launcher
from diffuserve.triton.address import TritonAddress
from diffuserve.triton.launcher import TritonServer
from diffuserve.triton.placement import PLACEMENT_NAME, described_placement, write_placement
from diffuserve.triton.repository import check_one_bundle, check_repository
from diffuserve_export.repository.assemble import repository_from_bundle
from diffuserve_export.repository.assemble_command import command as assemble
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


def lower_the_unets_batch(repository: Path) -> None:
    path = repository / UNET / "config.pbtxt"
    path.write_text(path.read_text().replace("max_batch_size: 32", "max_batch_size: 16"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda repository: give_another_bundle(repository, VAE_DECODER),
            r"are of different bundles: .*vae_decoder of 5e5e5e5e5e",
        ),
        (
            lower_the_unets_batch,
            "unet/config.pbtxt: the max_batch_size is 16, and stable_diffusion is configured for 32",
        ),
    ],
)
def test_a_triton_that_the_launcher_did_not_check_refuses_them_too(
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], None],
    message: str,
) -> None:
    shutil.copytree(repository, tmp_path / "repository")
    spoil(tmp_path / "repository")
    monkeypatch.setattr(launcher, "check_repository", lambda repository: None)
    with (
        pytest.raises(LaunchError, match=message),
        TritonServer(tmp_path / "repository", TritonAddress.on_free_ports()),
    ):
        pass


def test_a_bundle_is_no_repository(assembled: Path) -> None:
    bundle = assembled.with_name("bundle")
    with pytest.raises(LaunchError, match=rf"is a bundle, and no model repository.*diffuserve assemble {bundle}"):
        check_repository(bundle)


def test_a_stray_folder_is_named(assembled: Path) -> None:
    (assembled / "notes").mkdir()
    with pytest.raises(LaunchError, match=r"notes is not a model: it has no config\.pbtxt"):
        check_repository(assembled)


def test_nothing_is_assembled_among_other_files(assembled: Path, tmp_path: Path) -> None:
    repository_from_bundle(tmp_path / "bundle", assembled)
    (assembled / "another").mkdir()
    (assembled / "another" / "config.pbtxt").write_text("")
    repository_from_bundle(tmp_path / "bundle", assembled)  # another model of Triton's may lie beside ours
    home = tmp_path / "home"
    (home / "letters").mkdir(parents=True)
    with pytest.raises(BundleError, match="is not a model repository: it holds letters"):
        repository_from_bundle(tmp_path / "bundle", home)
    assert [path.name for path in home.iterdir()] == ["letters"]
    with pytest.raises(BundleError, match="is not a model repository: it holds bundle"):
        repository_from_bundle(tmp_path / "bundle", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="file is a file"):
        repository_from_bundle(tmp_path / "bundle", tmp_path / "file")


def test_loras_are_told_beside_the_models_name(assembled: Path, tmp_path: Path) -> None:
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest.title == manifest.model.name
    loras = (FusedLora("ink", 0.75, "ab" * 32), FusedLora("glow", 1.0, "cd" * 32))
    write_manifest(tmp_path / "bundle", msgspec.structs.replace(manifest, loras=loras))
    done = CliRunner().invoke(assemble, [str(tmp_path / "bundle"), "-o", str(assembled)])
    assert f"serves {manifest.model.name} with ink 0.75, glow 1 (" in done.output
