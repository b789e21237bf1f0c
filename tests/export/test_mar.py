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
from diffuserve.errors import BundleError
from diffuserve.limits import Limits
from diffuserve.serving_options import Serving
from diffuserve.torchserve.configuration import options_from_config, read_archive
from diffuserve_export.repository.archive import TorchServing, archive_from_bundle
from diffuserve_export.repository.archive_command import command


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
    assert options_from_config(manifest.model, {"handler": handler}) == (limits, serving)
    assert read_archive(path).limits == limits
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
    result = CliRunner().invoke(command, [str(bundle), "--min-workers", "2", "--output", str(tmp_path / "x.mar")])
    assert result.exit_code == 2
    assert "--max-workers is 1" in result.output


def test_a_required_safety_checker_that_is_not_there(bundle: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(bundle), "-o", str(tmp_path / "a.mar"), "--require-safety-checker"])
    assert isinstance(result.exception, BundleError)
    assert "safety checker" in str(result.exception)
    assert not list(tmp_path.iterdir())
