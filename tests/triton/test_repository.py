"""What a start accepts as a model repository."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from diffuserve.bundle.manifest import FusedLora, read_manifest, write_manifest
from diffuserve.errors import BundleError, ConfigurationError, LaunchError
from diffuserve.tensors import SAFETY_CHECKER, STABLE_DIFFUSION, STAGES, UNET, VAE_DECODER
from diffuserve.triton import launcher
from diffuserve.triton.address import TritonAddress
from diffuserve.triton.launcher import TritonServer
from diffuserve.triton.placement import PLACEMENT_NAME, described_placement, write_placement
from diffuserve.triton.repository import check_one_bundle, check_repository, read_stage_models
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
    assert check_repository(assembled) == (STABLE_DIFFUSION,)
    check_one_bundle(assembled, STABLE_DIFFUSION, [UNET, VAE_DECODER, "in_another_repository"])


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
    for check in (check_repository, lambda repository: check_one_bundle(repository, STABLE_DIFFUSION, [UNET])):
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
    monkeypatch.setattr(launcher, "check_repository", lambda repository: (STABLE_DIFFUSION,))
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
    for output, message in (
        ("file", "file is a file"),
        ("file/repository", "file/repository cannot be written: .*Not a dir"),
    ):
        (tmp_path / "file").write_text("")
        done = CliRunner().invoke(assemble, [str(tmp_path / "bundle"), "--output", str(tmp_path / output)])
        assert isinstance(done.exception, BundleError)
        assert re.search(message, str(done.exception))


def test_a_stage_that_is_missing_or_that_nothing_calls_is_named(assembled: Path) -> None:
    (assembled / UNET).rename(assembled / "another")
    with pytest.raises(BundleError, match=r"repository/unet is missing, which stable_diffusion calls"):
        check_repository(assembled)
    shutil.copytree(assembled / "another", assembled / UNET)
    with pytest.raises(LaunchError, match=r"No model of .* calls another, and Triton would load them"):
        check_repository(assembled)


def test_a_model_without_its_program_is_named(assembled: Path) -> None:
    (assembled / UNET / "1" / "model.py").unlink()
    with pytest.raises(BundleError, match=r"unet/1/model\.py is missing\. Assemble the repository again"):
        check_repository(assembled)


def test_stages_in_each_others_place_are_named(assembled: Path) -> None:
    config = assembled / STABLE_DIFFUSION / "config.pbtxt"
    text = config.read_text()
    assert text.count('"unet"') == text.count('"vae_encoder"') == 1
    config.write_text(
        text.replace('"unet"', '"swap"').replace('"vae_encoder"', '"unet"').replace('"swap"', '"vae_encoder"')
    )
    with pytest.raises(BundleError, match=r"calls (vae_encoder for its unet|unet for its vae_encoder), and that is"):
        check_repository(assembled)


def test_an_in_flight_model_in_several_processes_is_refused(assembled: Path) -> None:
    config = assembled / STABLE_DIFFUSION / "config.pbtxt"
    config.write_text(config.read_text().replace("count: 1", "count: 2"))
    with pytest.raises(ConfigurationError, match=r"the number of instances is 2; an in-flight model runs in 1"):
        check_repository(assembled)


# -- several models ----------------------------------------------------------------------------------------------------


@pytest.fixture
def two(assembled: Path, tmp_path: Path) -> Path:
    """A repository with another bundle under the name photos beside the default one."""
    make_bundle(tmp_path / "photos", safety_checker=True, bundle_sha256="ab" * 32)
    repository_from_bundle(tmp_path / "photos", assembled, name="photos")
    return assembled


def files_of(repository: Path, prefix: str) -> dict[str, tuple[bytes, int]]:
    """Content and inode of what lies in the folders whose names begin so."""
    return {
        str(path.relative_to(repository)): (path.read_bytes(), path.stat().st_ino)
        for path in repository.rglob("*")
        if path.is_file() and path.relative_to(repository).parts[0].startswith(prefix)
    }


def test_models_of_two_bundles_lie_side_by_side(two: Path) -> None:
    assert check_repository(two) == ("photos", STABLE_DIFFUSION)
    assert {folder.name for folder in two.iterdir()} == {
        *(STABLE_DIFFUSION, *STAGES),
        *("photos", *(f"photos_{stage}" for stage in (*STAGES, SAFETY_CHECKER))),
    }
    assert read_stage_models(two, STABLE_DIFFUSION) == {stage: stage for stage in STAGES}
    assert read_stage_models(two, "photos") == {stage: f"photos_{stage}" for stage in (*STAGES, SAFETY_CHECKER)}
    assert read_stage_models(two, "photos_unet") == {}


def test_bundles_are_compared_for_each_model(two: Path) -> None:
    give_another_bundle(two, "photos_unet")
    with pytest.raises(
        BundleError, match=r"photos in .* its stages are of different bundles: .*photos_unet of 5e5e5.* --name photos"
    ) as caught:
        check_repository(two)
    assert "stable_diffusion" not in str(caught.value)
    check_one_bundle(two, STABLE_DIFFUSION, STAGES)


def test_assembling_again_replaces_only_its_own(two: Path, tmp_path: Path) -> None:
    others = {prefix: files_of(two, prefix) for prefix in (STABLE_DIFFUSION, *STAGES)}
    make_bundle(tmp_path / "newer", safety_checker_left_out=True, bundle_sha256="cd" * 32)
    repository_from_bundle(tmp_path / "newer", two, name="photos")
    assert check_repository(two) == ("photos", STABLE_DIFFUSION)
    assert {prefix: files_of(two, prefix) for prefix in others} == others
    assert described_placement(two / "photos" / "1").bundle_sha256 == "cd" * 32
    assert not (two / "photos_safety_checker").exists()  # that of the earlier bundle


@pytest.mark.parametrize("name", [UNET, "photos_unet", "photos_safety_checker"])
def test_a_model_does_not_replace_what_another_needs(two: Path, tmp_path: Path, name: str) -> None:
    before = files_of(two, "")
    with pytest.raises(BundleError, match=rf"{name} would replace {name} in .*Choose another --name or --output"):
        repository_from_bundle(tmp_path / "bundle", two, name=name)
    assert files_of(two, "") == before


def test_a_stage_does_not_replace_a_model(assembled: Path, tmp_path: Path) -> None:
    repository_from_bundle(tmp_path / "bundle", assembled, name="photos_unet")
    with pytest.raises(
        BundleError, match=r"The model photos would replace photos_unet in .* which the model photos_unet"
    ):
        repository_from_bundle(tmp_path / "bundle", assembled, name="photos")


@pytest.mark.parametrize("name", [UNET, SAFETY_CHECKER, "photos_safety_checker", "photos_unet_unet"])
def test_a_models_name_is_not_like_a_stages(tmp_path: Path, name: str) -> None:
    """Of the default model, whether it is there or not, or of one that is there, whether it has that stage or not."""
    make_bundle(tmp_path / "bundle")
    repository_from_bundle(tmp_path / "bundle", tmp_path / "repository", name="photos")
    before = files_of(tmp_path / "repository", "")
    with pytest.raises(BundleError, match=f"The name {name} would be taken for that of a stage of another model"):
        repository_from_bundle(tmp_path / "bundle", tmp_path / "repository", name=name)
    assert files_of(tmp_path / "repository", "") == before
    assert check_repository(tmp_path / "repository") == ("photos",)


@pytest.mark.parametrize(("first", "second"), [("photos_safety_checker", "photos"), ("photos_unet", "photos")])
def test_no_model_comes_whose_stage_is_named_like_another(tmp_path: Path, first: str, second: str) -> None:
    make_bundle(tmp_path / "bundle")
    repository_from_bundle(tmp_path / "bundle", tmp_path / "repository", name=first)
    before = files_of(tmp_path / "repository", "")
    with pytest.raises(BundleError, match="Choose another --name or --output"):
        repository_from_bundle(tmp_path / "bundle", tmp_path / "repository", name=second)
    assert files_of(tmp_path / "repository", "") == before


@pytest.mark.parametrize("name", ["", ".photos", "a/b", "..", "a b", "a" * 65, "é"])
def test_a_name_that_cannot_be_a_models(tmp_path: Path, name: str) -> None:
    make_bundle(tmp_path / "bundle")
    refused = CliRunner().invoke(
        assemble, [str(tmp_path / "bundle"), "-o", str(tmp_path / "repository"), "--name", name]
    )
    assert isinstance(refused.exception, BundleError)
    assert f"The name {name!r} is not valid for a model" in str(refused.exception)
    with pytest.raises(BundleError, match="is not valid for a model"):
        repository_from_bundle(tmp_path / "bundle", tmp_path / "repository", name=name)
    assert not (tmp_path / "repository").exists()


def test_loras_are_told_beside_the_models_name(assembled: Path, tmp_path: Path) -> None:
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest.title == manifest.model.name
    loras = (FusedLora("ink", 0.75, "ab" * 32), FusedLora("glow", 1.0, "cd" * 32))
    write_manifest(tmp_path / "bundle", msgspec.structs.replace(manifest, loras=loras))
    done = CliRunner().invoke(assemble, [str(tmp_path / "bundle"), "-o", str(assembled)])
    assert f"serves {manifest.model.name} with ink 0.75, glow 1 (" in done.output
