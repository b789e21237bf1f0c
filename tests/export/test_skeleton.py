"""`export --without-weights`: the graphs of an export, with references in the place of the weights."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner

from diffuserve.bundle.checksums import verify
from diffuserve.bundle.manifest import read_manifest
from diffuserve.tensors import TEXT_ENCODER, UNET, VAE_DECODER, VAE_ENCODER
from diffuserve_export.checkpoint import skeleton
from diffuserve_export.checkpoint.checkpoint import open_checkpoint
from diffuserve_export.checkpoint.load import model_from_checkpoint
from diffuserve_export.export_command import command
from diffuserve_export.graphs.modules import modules_from_model
from diffuserve_export.graphs.onnx import onnx_from_module, program_from_module
from tests.export.tiny import WRITERS

ARCHITECTURES = Path(__file__).parents[2] / "loadtest" / "architectures"
# What the published checkpoints hold: as counted from their files, and for UNet and VAE as their papers and cards say.
WEIGHTS = {
    "sd15": {TEXT_ENCODER: 123_060_480, UNET: 859_520_964, "vae": 83_653_863},
    "sdxl": {TEXT_ENCODER: 123_060_480 + 694_659_840, UNET: 2_567_463_684, "vae": 83_653_863},
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_architectures_are_those_of_the_published_checkpoints(name: str) -> None:
    checkpoint = open_checkpoint(ARCHITECTURES / name, safety_checker=False, weights=False)
    assert checkpoint.spec.width == {"sd15": 512, "sdxl": 1024}[name]
    model = skeleton._model_of_marks(checkpoint)
    counted = {
        TEXT_ENCODER: _parameters(model.text_encoder) + _parameters(model.text_encoder_2),
        UNET: _parameters(model.unet),
        "vae": _parameters(model.vae),
    }
    assert counted == WEIGHTS[name]


def _parameters(module: Any) -> int:
    return 0 if module is None else sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize("family, stage", [("sd1", TEXT_ENCODER)])
def test_a_graph_is_the_exported_one(family: str, stage: str, tmp_path: Path) -> None:
    compare(family, [stage], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_all_graphs_are_the_exported_ones(family: str, tmp_path: Path) -> None:
    compare(family, [TEXT_ENCODER, UNET, VAE_DECODER, VAE_ENCODER], tmp_path)


def compare(family: str, stages: list[str], folder: Path) -> None:
    """Exports stages with weights and without: the same nodes, and of the initializers those that are weights as references."""
    checkpoint = open_checkpoint(WRITERS[family](folder / "checkpoint"))
    marked = modules_from_model(skeleton._model_of_marks(checkpoint), checkpoint.spec)
    modules = modules_from_model(model_from_checkpoint(checkpoint), checkpoint.spec)
    for stage in stages:
        module, tensors = modules[stage], checkpoint.tensors[stage]
        differ_from_each_other(module)
        onnx_from_module(module, stage, tensors, checkpoint.spec, folder / "with.onnx")
        skeleton._save_without_weights(
            program_from_module(marked[stage], stage, tensors, checkpoint.spec), folder / "without.onnx"
        )
        exported = onnx.load(folder / "with.onnx").graph
        bare = onnx.load(folder / "without.onnx", load_external_data=False).graph
        assert list(bare.node) == list(exported.node)
        assert list(bare.input) == list(exported.input)
        weights = {tensor.name: tensor for tensor in exported.initializer}
        assert [tensor.name for tensor in bare.initializer] == list(weights)
        referred = [tensor for tensor in bare.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
        assert referred
        assert all(list(tensor.dims) == list(weights[tensor.name].dims) for tensor in referred)
        # What is not referred to does not depend on the weights, which are others here and there.
        assert all(tensor == weights[tensor.name] for tensor in bare.initializer if tensor not in referred)
        assert {_place(tensor)["location"] for tensor in referred} == {"without.onnx.data"}
        ends = sorted((int(_place(tensor)["offset"]), int(_place(tensor)["length"])) for tensor in referred)
        assert all(offset + length <= following for (offset, length), (following, _) in itertools.pairwise(ends))
    assert not (folder / "without.onnx.data").exists()


def differ_from_each_other(module: Any) -> None:
    """Fresh biases are zeros and scales ones, which the exporter would merge; trained ones are not."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))


def _place(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


@pytest.mark.slow
def test_on_the_command_line(shared_checkpoint: Path, tmp_path: Path) -> None:
    configs = Path(
        shutil.copytree(shared_checkpoint, tmp_path / "tiny", ignore=shutil.ignore_patterns("*.safetensors"))
    )
    output = tmp_path / "skeleton"
    result = CliRunner().invoke(command, [str(configs), "--without-weights", "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "It has no weights" in result.output
    manifest = read_manifest(output)
    verify(output, manifest)
    assert manifest.model == open_checkpoint(shared_checkpoint).spec
    assert {file.path for file in manifest.files} >= {"unet/config.json", "vae/config.json", "tokenizer/tokenizer.json"}
    assert all(
        [file.path for file in each.files] == [f"{name}/model.onnx"] for name, each in manifest.components.items()
    )
    assert not list(output.rglob("*.data"))


def test_what_needs_weights_is_refused(shared_checkpoint: Path, tmp_path: Path) -> None:
    arguments = [str(shared_checkpoint), "--without-weights", "--engine", "openvino"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 2
    assert "leave out --config, --lora, --engine and" in result.output
    (tmp_path / "other").write_text("mine")
    result = CliRunner().invoke(command, [str(shared_checkpoint), "--without-weights", "--output", str(tmp_path)])
    assert "is not a bundle, so it is not replaced" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
