"""The committed model repository is what `assemble` writes for the bundled model, and assembling checks what it places."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from diffuserve.bundle.manifest import read_manifest
from diffuserve.engines import load_engine
from diffuserve.errors import BundleError
from diffuserve.limits import MAX_DECODE_BATCH, Limits
from diffuserve.serving_options import Serving
from diffuserve.triton.placement import PLACEMENT_NAME, read_placement
from diffuserve_export.repository.assemble import repository_from_bundle
from diffuserve_export.repository.assemble_command import command
from diffuserve_export.repository.triton_config import (
    INFLIGHT_MODEL_PY,
    STAGE_MODEL_PY,
    configs_from_manifest,
    text_from_config,
)
from tests.core.fakes import make_bundle

COMMITTED = Path(__file__).parents[2] / "triton_repo"
MODELS = {"text_encoder", "unet", "vae_decoder", "vae_encoder", "stable_diffusion"}


def default_configs(bundle: Path) -> dict[str, Any]:
    manifest = read_manifest(bundle)
    return configs_from_manifest(manifest, Limits.for_model(manifest.model), Serving())


def test_the_committed_repository_is_up_to_date(bundle: Path) -> None:
    configs = default_configs(bundle)
    assert set(configs) == MODELS == {folder.name for folder in COMMITTED.iterdir()}
    for name, config in configs.items():
        assert (COMMITTED / name / "config.pbtxt").read_text() == text_from_config(config)
        model_py = INFLIGHT_MODEL_PY if name == "stable_diffusion" else STAGE_MODEL_PY
        assert (COMMITTED / name / "1" / "model.py").read_text() == model_py


def test_the_timestep_is_batched_and_the_loops_model_is_not(bundle: Path) -> None:
    configs = default_configs(bundle)
    assert configs["unet"].max_batch_size > 1
    assert configs["unet"].dynamic_batching.max_queue_delay_microseconds == 0
    assert "max_batch_size: 0" in text_from_config(configs["stable_diffusion"])
    assert configs["stable_diffusion"].model_transaction_policy.decoupled
    for config in configs.values():
        assert [(group.count, group.kind) for group in config.instance_group] == [(1, 2)]  # one, KIND_CPU


def test_a_damaged_bundle_is_not_assembled(bundle: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "bundle"
    shutil.copytree(bundle, damaged)
    path = damaged / "unet" / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"unet/model\.onnx is damaged"):
        repository_from_bundle(damaged, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_a_file_that_changed_after_assembly_is_not_started(bundle: Path, tmp_path: Path) -> None:
    repository_from_bundle(bundle, tmp_path)
    folder = tmp_path / "unet" / "1"
    assert read_placement(folder).files
    copy = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").unlink()  # it may be a link to the bundle's own file
    (folder / "model.onnx").write_bytes(copy)
    assert read_placement(folder).files
    (folder / "model.onnx").write_bytes(copy[:-1] + bytes([copy[-1] ^ 1]))
    with pytest.raises(BundleError, match="has changed since it was assembled"):
        read_placement(folder)
    (folder / PLACEMENT_NAME).unlink()
    with pytest.raises(BundleError, match="holds no engine"):
        read_placement(folder)


def test_assembling_again_repairs_and_leaves_nothing_aside(bundle: Path, tmp_path: Path) -> None:
    repository_from_bundle(bundle, tmp_path)
    (tmp_path / "unet" / "1" / PLACEMENT_NAME).unlink()
    (tmp_path / "unet" / "config.pbtxt").write_text("spoiled")
    repository_from_bundle(bundle, tmp_path)
    read_placement(tmp_path / "unet" / "1")
    assert "spoiled" not in (tmp_path / "unet" / "config.pbtxt").read_text()
    assert not list(tmp_path.rglob(".*"))


def test_what_the_engine_has_stored_is_placed_too(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    component = read_manifest(copy).components["unet"]
    load_engine(copy / component.files[0].path, component, threads=1)
    [entry] = (copy / "unet").glob("*.onnxruntime")
    placed = tmp_path / "repository" / "unet" / "1"
    (placed / "another.onnxruntime").mkdir(parents=True)
    repository_from_bundle(copy, tmp_path / "repository")
    assert [each.name for each in placed.glob("*.onnxruntime")] == [entry.name]
    (placed / "model.onnx").unlink()
    load_engine(placed / "model.onnx", component, threads=1)


def test_a_safety_checker_is_assembled_required_and_removed_again(tmp_path: Path) -> None:
    checked, plain, repository = tmp_path / "checked", tmp_path / "plain", tmp_path / "repository"
    make_bundle(checked, safety_checker=True)
    make_bundle(plain, safety_checker_left_out=True)
    arguments = ["--require-safety-checker", "--output", str(repository)]
    refused = CliRunner().invoke(command, [str(plain), *arguments])
    assert isinstance(refused.exception, BundleError)
    assert "export the checkpoint again without --no-safety-checker" in str(refused.exception)
    assert not repository.exists()

    assert CliRunner().invoke(command, [str(checked), *arguments]).exit_code == 0
    assert {folder.name for folder in repository.iterdir()} == MODELS | {"safety_checker"}
    assert (
        'key: "require_safety_checker"\n  value {\n    string_value: "True"'
        in (repository / "stable_diffusion" / "config.pbtxt").read_text()
    )
    assert default_configs(checked)["safety_checker"].max_batch_size == MAX_DECODE_BATCH

    (repository / "mine").mkdir()
    (repository / "mine" / "config.pbtxt").write_text("")
    assert CliRunner().invoke(command, [str(plain), "--output", str(repository)]).exit_code == 0
    # Triton would load the one that the earlier bundle had.
    assert {folder.name for folder in repository.iterdir()} == MODELS | {"mine"}


def test_a_folder_that_was_not_assembled_is_left_alone(tmp_path: Path) -> None:
    make_bundle(tmp_path / "plain")
    mine = tmp_path / "repository" / "safety_checker"
    mine.mkdir(parents=True)
    repository_from_bundle(tmp_path / "plain", tmp_path / "repository")
    assert mine.is_dir()


def test_a_bundle_of_a_newer_version_is_not_assembled(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle", format_version=99)
    result = CliRunner().invoke(command, [str(tmp_path / "bundle"), "--output", str(tmp_path / "repository")])
    assert isinstance(result.exception, BundleError)
    assert "has format version 99, and this diffuserve reads up to" in str(result.exception)
    assert not (tmp_path / "repository").exists()
