"""The committed model repository is what `assemble` writes for the bundled model, and assembling checks what it places."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from diffuserve import __version__
from diffuserve.bundle.manifest import read_manifest, write_manifest
from diffuserve.engines import load_engine
from diffuserve.errors import BundleError, ConfigurationError
from diffuserve.limits import MAX_DECODE_BATCH, Limits
from diffuserve.options import options_of
from diffuserve.serving_options import Serving
from diffuserve.triton.configuration import check_stages, read_config, read_options, read_stage_models
from diffuserve.triton.placement import PLACEMENT_NAME, read_placement
from diffuserve.triton.repository import check_repository
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
        text = (COMMITTED / name / "config.pbtxt").read_text()
        # The exporter may round otherwise on another processor, and the bundle's checksum is in the head.
        head = re.match("(# .*\n){3}", text)
        assert head
        assert text == text_from_config(config, head[0])
        model_py = INFLIGHT_MODEL_PY if name == "stable_diffusion" else STAGE_MODEL_PY
        assert (COMMITTED / name / "1" / "model.py").read_text() == model_py


def test_the_timestep_is_batched_and_the_loops_model_is_not(bundle: Path) -> None:
    configs = default_configs(bundle)
    assert configs["unet"].max_batch_size > 1
    assert configs["unet"].dynamic_batching.max_queue_delay_microseconds == 0
    assert "max_batch_size: 0" in text_from_config(configs["stable_diffusion"], "")
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
    assert "has format version 99, and this diffuserve reads version" in str(result.exception)
    assert not (tmp_path / "repository").exists()


def assemble(folder: Path, *arguments: str) -> str:
    """What the command says; it must succeed."""
    done = CliRunner().invoke(command, [str(folder / "bundle"), "-o", str(folder / "repository"), *arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_options_are_configured_named_in_the_head_and_said_to_be_lost(tmp_path: Path) -> None:
    options = "--limit max_steps=200 --limit max_rows=64 --policy fair --unet-instances 2 --call-timeout 600.0"
    arguments = [*options.split(), "--require-safety-checker"]
    make_bundle(tmp_path / "bundle", safety_checker=True)
    assert "Not kept" not in assemble(tmp_path, *arguments)
    repository = tmp_path / "repository"
    limits, serving = read_options(repository)
    assert (limits.max_steps, limits.max_rows) == (200, 64)
    assert serving == Serving(policy="fair", unet_instances=2, call_timeout_s=600, require_safety_checker=True)
    check_stages(repository, "stable_diffusion", read_stage_models(repository, "stable_diffusion"), limits, serving)
    unet = read_config(repository / "unet")
    assert (unet.max_batch_size, unet.instance_group[0].count) == (64, 2)
    assert unet.parameters["call_timeout_s"].string_value == "600.0"

    manifest = read_manifest(tmp_path / "bundle")
    for folder in repository.iterdir():
        text = (folder / "config.pbtxt").read_text()
        assert text.startswith(
            f"# Written by `diffuserve assemble`, version {__version__}.\n"
            f"# Checkpoint: {manifest.model.name}, SHA-256 {manifest.source_sha256}.\n"
            f"# Options: {options} --require-safety-checker.\n"
        )
        assert text.count("#") == 3

    said = assemble(tmp_path, "--limit", "max_rows=48", "--policy", "fair", "--call-timeout", "600")
    assert "Not kept from before: --limit max_steps=200 --unet-instances 2 --require-safety-checker." in said
    assert "Not kept" in assemble(tmp_path)
    assert "Not kept" not in assemble(tmp_path)
    assert "# Options: none.\n" in (repository / "unet" / "config.pbtxt").read_text()


def test_a_unet_that_takes_tensors_on_a_gpu_is_given_them(tmp_path: Path) -> None:
    manifest = make_bundle(tmp_path / "bundle")
    components = {
        name: msgspec.structs.replace(component, engine="torch-cuda", precision="fp16")
        for name, component in manifest.components.items()
    }
    on_gpu = msgspec.structs.replace(manifest, components=components)
    for described, expected in ((manifest, set()), (on_gpu, {"unet"})):
        configs = configs_from_manifest(described, Limits.for_model(manifest.model), Serving())
        given = {name: config.parameters for name, config in configs.items()}
        asked = {name for name, parameters in given.items() if "FORCE_CPU_ONLY_INPUT_TENSORS" in parameters}
        assert asked == expected
        assert all(given[name]["FORCE_CPU_ONLY_INPUT_TENSORS"].string_value == "no" for name in asked)


def test_a_default_that_is_given_takes_the_place_of_what_was_before(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    given = "--limit max_steps=200 --policy fair --backend onnxruntime"
    assemble(tmp_path, *given.split())
    said = assemble(tmp_path, "--limit", "max_steps=150", "--policy", Serving().policy, "--backend", "python")
    assert "Not kept" not in said
    assemble(tmp_path, *given.split())
    assert f"Not kept from before: {given}." in assemble(tmp_path, "--limit", "max_rows=32")


def test_nothing_is_lost_where_only_the_models_own_defaults_differ(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    assemble(tmp_path)
    shutil.rmtree(tmp_path / "bundle")
    make_bundle(tmp_path / "bundle")
    manifest = read_manifest(tmp_path / "bundle")
    write_manifest(
        tmp_path / "bundle",
        msgspec.structs.replace(manifest, model=msgspec.structs.replace(manifest.model, width=128)),
    )
    assert "Not kept" not in assemble(tmp_path)
    assert read_options(tmp_path / "repository")[0].max_side_px == 256


def test_a_name_of_several_lines_stays_a_comment(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    manifest = read_manifest(tmp_path / "bundle")
    model = msgspec.structs.replace(manifest.model, name='x\nbackend: "other"')
    write_manifest(tmp_path / "bundle", msgspec.structs.replace(manifest, model=model))
    assemble(tmp_path)
    assert read_config(tmp_path / "repository" / "unet").backend == "python"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("max_row=3", "There is no limit 'max_row'. There are: max_steps, "),
        ("max_rows", "max_rows has no value. Write max_rows=VALUE; it must be a whole number from 1 to 1024."),
        ("max_rows=many", "max_rows is 'many'; it must be a whole number from 1 to 1024."),
        ("max_rows=0", "max_rows is 0; it must be a whole number from 1 to 1024."),
    ],
)
def test_a_wrong_limit_is_refused_with_what_is_allowed(tmp_path: Path, argument: str, message: str) -> None:
    done = CliRunner().invoke(command, [str(tmp_path), "--limit", argument])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


def test_the_help_lists_every_limit_with_its_default() -> None:
    shown = " ".join(CliRunner().invoke(command, ["--help"]).output.split())
    for limit in options_of(Limits).values():
        default = "twice the longer of the model's own" if limit.name == "max_side_px" else f"{limit.default:g}"
        assert f"{limit.name} {limit.meaning} [default: {default}; {limit.allowed}]" in shown


@pytest.mark.parametrize(
    ("parameter", "value", "message"),
    [
        (
            "max_rows",
            "64",
            "text_encoder/config.pbtxt: the max_batch_size is 32, and stable_diffusion is configured for 64",
        ),
        (
            "unet_instances",
            "2",
            "unet/config.pbtxt: the number of instances is 1, and stable_diffusion is configured for 2",
        ),
        ("call_timeout_s", "301", "the call_timeout_s is 300, and stable_diffusion is configured for 301"),
        ("policy", "lottery", "stable_diffusion/config.pbtxt: policy is 'lottery'; it must be one of fifo, fair, srpt"),
        ("max_steppes", "3", "stable_diffusion/config.pbtxt: There is no parameter 'max_steppes'"),
    ],
)
def test_a_start_refuses_options_that_the_stages_were_not_assembled_for(
    tmp_path: Path, parameter: str, value: str, message: str
) -> None:
    make_bundle(tmp_path / "bundle")
    assemble(tmp_path)
    config = read_config(tmp_path / "repository" / "stable_diffusion")
    config.parameters[parameter].string_value = value
    (tmp_path / "repository" / "stable_diffusion" / "config.pbtxt").write_text(text_from_config(config, ""))
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        check_repository(tmp_path / "repository")


def set_parameters(model_folder: Path, **parameters: str) -> None:
    config = read_config(model_folder)
    for name, value in parameters.items():
        config.parameters[name].string_value = value
    (model_folder / "config.pbtxt").write_text(text_from_config(config, ""))


@pytest.mark.parametrize("model", ["stable_diffusion", "unet"])
def test_tritons_own_parameters_are_known_and_no_others_in_upper_case(tmp_path: Path, model: str) -> None:
    make_bundle(tmp_path / "bundle")
    assemble(tmp_path)
    folder = tmp_path / "repository" / model
    own = {
        "EXECUTION_ENV_PATH": "env.tar.gz",
        "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
        "TRITON_BATCH_STRATEGY_PATH": "x.so",
    }
    set_parameters(folder, **own)
    check_repository(tmp_path / "repository")
    set_parameters(folder, MAX_ROWS="64")
    with pytest.raises(ConfigurationError, match=rf"{model}/config\.pbtxt: There is no parameter 'MAX_ROWS'"):
        check_repository(tmp_path / "repository")


def test_a_stages_unknown_parameter_is_refused(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    assemble(tmp_path)
    folder = tmp_path / "repository" / "vae_decoder"
    set_parameters(folder, call_timeout="900")
    message = r"vae_decoder/config\.pbtxt: There is no parameter 'call_timeout'\. There are: call_timeout_s\."
    with pytest.raises(ConfigurationError, match=message):
        check_repository(tmp_path / "repository")
    config = read_config(folder)
    config.backend = "openvino"  # whose parameters are not ours
    (folder / "config.pbtxt").write_text(text_from_config(config, ""))
    check_repository(tmp_path / "repository")


def test_a_stage_that_does_not_name_its_timeout_has_the_default(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    assemble(tmp_path)
    folder = tmp_path / "repository" / "unet"
    config = read_config(folder)
    del config.parameters["call_timeout_s"]
    (folder / "config.pbtxt").write_text(text_from_config(config, ""))
    check_repository(tmp_path / "repository")
    set_parameters(tmp_path / "repository" / "stable_diffusion", call_timeout_s="301")
    for other in ("text_encoder", "vae_decoder", "vae_encoder"):
        set_parameters(tmp_path / "repository" / other, call_timeout_s="301")
    message = r"unet/config\.pbtxt: the call_timeout_s is 300, and stable_diffusion is configured for 301"
    with pytest.raises(ConfigurationError, match=message):
        check_repository(tmp_path / "repository")


def test_a_start_takes_stages_that_can_do_more(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    assemble(tmp_path, "--limit", "max_rows=64", "--unet-instances", "2", "--call-timeout", "600")
    repository = tmp_path / "repository"
    stage_models = read_stage_models(repository, "stable_diffusion")
    check_stages(repository, "stable_diffusion", stage_models, Limits(), Serving())


def test_options_are_those_of_one_model(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    assemble(tmp_path, "--limit", "max_rows=64")
    said = assemble(tmp_path, "--name", "photos", "--limit", "max_steps=99", "--policy", "fair")
    assert "as photos" in said
    assert "Not kept" not in said
    repository = tmp_path / "repository"
    assert read_options(repository)[0].max_rows == 64
    limits, serving = read_options(repository, "photos")
    assert (limits.max_steps, limits.max_rows, serving.policy) == (99, Limits().max_rows, "fair")
    assert "# Options: --limit max_steps=99 --policy fair --name photos.\n" in (
        (repository / "photos_unet" / "config.pbtxt").read_text()
    )
    assert "Not kept from before: --policy fair." in assemble(tmp_path, "--name", "photos", "--limit", "max_steps=99")
    assert "Not kept from before: --limit max_rows=64." in assemble(tmp_path)

    config = read_config(repository / "photos_unet")
    config.max_batch_size = 8
    (repository / "photos_unet" / "config.pbtxt").write_text(text_from_config(config, ""))
    with pytest.raises(ConfigurationError, match=r"photos_unet/.* is 8, and photos is configured for 32"):
        check_repository(repository)


def test_a_configuration_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    assemble(tmp_path)
    (tmp_path / "repository" / "unet" / "config.pbtxt").write_text("max_batch_size: many")
    with pytest.raises(ConfigurationError, match=r"unet/config\.pbtxt cannot be read: .*Write it again"):
        check_repository(tmp_path / "repository")
