"""`diffuserve archive`: what is in a model archive, and what is left when it cannot be written."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from diffuserve.bundle.manifest import read_manifest
from diffuserve.errors import BundleError, ConfigurationError, LaunchError
from diffuserve.limits import Limits
from diffuserve.serving_options import Serving
from diffuserve.torchserve.address import TorchServeAddress
from diffuserve.torchserve.configuration import only_archive, properties, read_archive
from diffuserve_export.repository.archive import archive_from_bundle
from diffuserve_export.repository.archive_command import command
from diffuserve_export.repository.torchserve_options import TorchServing


def test_the_archive_holds_the_bundle_its_settings_and_the_handler(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "store" / "mine.mar"
    torchserve = TorchServing(batch_size=3, max_batch_delay_ms=7, max_workers=2)
    limits = replace(Limits.for_model(read_manifest(bundle).model), max_steps=200)
    serving = Serving(policy="fifo", call_timeout_s=89.5)
    manifest = archive_from_bundle(bundle, path, limits, serving, torchserve=torchserve)
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        for file in manifest.all_files():
            assert archive.read(file.path) == (bundle / file.path).read_bytes()
        config = yaml.safe_load(archive.read("model-config.yaml"))
        described = json.loads(archive.read("MAR-INF/MANIFEST.json"))["model"]
        assert b"from diffuserve_handlers import" in archive.read(described["handler"])
    others = {"manifest.json", "model-config.yaml", "MAR-INF/MANIFEST.json", described["handler"]}
    assert names == others | {file.path for file in manifest.all_files()}
    assert (described["modelName"], described["configFile"]) == ("mine", "model-config.yaml")
    handler = config.pop("handler")
    assert config == {
        "minWorkers": 1,
        "maxWorkers": 2,
        "batchSize": 3,
        "maxBatchDelay": 7,
        "responseTimeout": 90,
        "startupTimeout": 600,
        "deviceType": "cpu",
    }
    assert handler["bundle_sha256"] == manifest.bundle_sha256
    found = read_archive(path)
    assert (found.limits, found.serving) == (limits, serving)
    assert [file.name for file in path.parent.iterdir()] == ["mine.mar"]


def test_by_reference_names_the_bundle_instead(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.mar"
    archive_from_bundle(bundle, path, by_reference=True)
    assert path.stat().st_size < 10_000
    archive = read_archive(path)
    assert archive.config["handler"]["bundle"] == str(bundle.resolve())
    assert archive.manifest == read_manifest(bundle)


def test_a_bundle_with_a_comma_and_other_files_in_it(bundle: Path, tmp_path: Path) -> None:
    """torch-model-archiver splits paths at commas and takes whole folders."""
    odd = Path(shutil.copytree(bundle, tmp_path / "a, [b]"))
    (odd / "secret.txt").write_text("not of the bundle")
    path = tmp_path / "out, put" / "odd.mar"
    archive_from_bundle(odd, path)
    with zipfile.ZipFile(path) as archive:
        assert "secret.txt" not in archive.namelist()
        assert "unet/model.onnx" in archive.namelist()


def test_a_damaged_bundle_leaves_the_archive_that_was_there(bundle: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(bundle, tmp_path / "damaged"))
    (damaged / "unet" / "model.onnx").write_bytes(b"")
    path = tmp_path / "store" / "kept.mar"
    path.parent.mkdir()
    path.write_bytes(b"older")
    with pytest.raises(BundleError, match="is damaged"):
        archive_from_bundle(damaged, path)
    with pytest.raises(BundleError, match="torch-model-archiver could not write"):
        archive_from_bundle(bundle, path.with_name("_a name.mar"))
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == {"kept.mar": b"older"}


def test_wrong_names_and_settings(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"ending \.mar"):
        archive_from_bundle(bundle, tmp_path / "archive.zip")
    for arguments, message in (
        (["--min-workers", "2"], "max_workers is 1, less than min_workers, which is 2."),
        (["--limit", "max_waiting_requests=4"], "have up to 8 requests, and max_waiting_requests is 4"),
        (["--limit", "max_side_px=8"], "max_side_px is 8; the smallest image of tiny-emoji has 32 px."),
    ):
        result = CliRunner().invoke(command, [str(bundle), *arguments, "--output", str(tmp_path / "x.mar")])
        assert isinstance(result.exception, ConfigurationError)
        assert message in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_options_by_command_are_archived_and_said_to_be_lost(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "store" / "a.mar"

    def archive(*arguments: str) -> str:
        done = CliRunner().invoke(command, [str(bundle), "--by-reference", "-o", str(path), *arguments])
        assert done.exit_code == 0, done.output
        return done.output

    options = "--limit max_prompt_bytes=500000 --policy fair --call-timeout 900 --batch-size 4 --startup-timeout 1200"
    assert "Not kept" not in archive(*options.split())
    found = read_archive(path)
    assert (found.limits.max_prompt_bytes, found.serving.policy) == (500_000, "fair")
    assert found.serving.call_timeout_s == found.config["responseTimeout"] == 900
    assert (found.config["batchSize"], found.config["startupTimeout"]) == (4, 1200)
    # Both prompts with every byte escaped as JSON may do it: \\u0000.
    [line] = [each for each in properties(found, TorchServeAddress()).splitlines() if "max_request_size" in each]
    assert int(line.partition("=")[2]) > 2 * 6 * 500_000

    said = archive("--batch-size", "6")
    assert (
        "Not kept from before: --startup-timeout 1200 --limit max_prompt_bytes=500000 --policy fair --call-timeout 900.0."
        in said
    )
    assert "Not kept" not in archive("--batch-size", "8")  # the default
    archive("--batch-size", "6")
    assert "--batch-size" in archive()
    assert "Not kept" not in archive()


def test_a_required_safety_checker_that_is_not_there(bundle: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(bundle), "-o", str(tmp_path / "a.mar"), "--require-safety-checker"])
    assert isinstance(result.exception, BundleError)
    assert "safety checker" in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_the_only_archive_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"holds no archive\. Name one with --archive, or make one"):
        only_archive(tmp_path / "missing")
    (tmp_path / "a.mar").touch()
    assert only_archive(tmp_path) == tmp_path / "a.mar"
    (tmp_path / "b.mar").touch()
    with pytest.raises(LaunchError, match=r"holds 2 archives: a\.mar, b\.mar\. Name one"):
        only_archive(tmp_path)
