"""A bundle appears whole or not at all, and is made only when something has changed."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from diffuserve.bundle.checksums import verify
from diffuserve.bundle.manifest import read_manifest
from diffuserve.errors import BundleError, CheckpointError
from diffuserve.text.tokenizer import Tokenizer
from diffuserve_export import room
from diffuserve_export.checkpoint.checkpoint import open_checkpoint
from diffuserve_export.checkpoint.safetensors_file import TensorInfo
from diffuserve_export.checkpoint.weights import Weights
from diffuserve_export.export import bundle_from_checkpoint, unchanged_manifest
from diffuserve_export.export_command import command
from diffuserve_export.lora import Lora
from diffuserve_export.room import available_memory_bytes, bundle_size_bytes, export_memory_bytes
from diffuserve_export.staging import staged
from tests.export.conftest import KilledExport


def finished_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_manifest(tiny_bundle: Path, shared_checkpoint: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    verify(tiny_bundle, manifest)
    assert manifest.source == "tiny"
    [image] = manifest.images
    assert set(image.engines.values()) == {"onnxruntime fp32"}
    assert image.passed
    assert image.psnr_db is None or image.psnr_db > 50
    assert image.ssim > 0.999
    with Image.open(tiny_bundle / manifest.reference.file.path) as drawn:
        assert drawn.size == (manifest.reference.width, manifest.reference.height) == (96, 64)
    assert manifest.source_sha256 == open_checkpoint(shared_checkpoint).sha256
    assert manifest.checkpoint_sha256 == ""  # it is a folder
    assert {"python", "torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "diffuserve"} <= set(
        manifest.versions
    )
    on_disk = {
        file.relative_to(tiny_bundle).as_posix()
        for file in tiny_bundle.rglob("*")
        if file.is_file() and file.parent.suffix != ".onnxruntime"  # what the engine has stored
    }
    assert on_disk == {file.path for file in manifest.all_files()} | {"manifest.json"}
    assert str(shared_checkpoint.parent) not in (tiny_bundle / "manifest.json").read_text()


def test_tokenizer_json_is_written_for_checkpoints_without(tiny_bundle: Path, shared_checkpoint: Path) -> None:
    from transformers import CLIPTokenizer

    assert not (shared_checkpoint / "tokenizer" / "tokenizer.json").exists()
    theirs = CLIPTokenizer.from_pretrained(shared_checkpoint / "tokenizer")
    ours = Tokenizer(tiny_bundle / "tokenizer", max_tokens=77)
    for text in ("", "a cat, blue", "Grüße 😀 " * 40):
        expected = theirs(text, padding="max_length", truncation=True, max_length=77).input_ids
        np.testing.assert_array_equal(ours.encode([(text, 1.0)]).input_ids, [expected])


def test_unchanged_checkpoint_is_not_exported_again(tiny_bundle: Path, shared_checkpoint: Path, tmp_path: Path) -> None:
    before = (tiny_bundle / "manifest.json").stat()
    result = CliRunner().invoke(command, [str(shared_checkpoint), "--output", str(tiny_bundle)], catch_exceptions=False)
    assert result.exit_code == 0
    assert "is up to date" in result.output
    bundle_from_checkpoint(shared_checkpoint, tiny_bundle)
    assert (tiny_bundle / "manifest.json").stat() == before


def test_what_counts_as_a_change(tiny_bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    assert unchanged_manifest(open_checkpoint(checkpoint), bundle) is not None
    assert unchanged_manifest(open_checkpoint(checkpoint, guidance_scale=3), bundle) is None
    for scale in (0.5, 0.7):
        lora = Lora(checkpoint / "vae" / "diffusion_pytorch_model.safetensors", scale)  # any file will do
        assert unchanged_manifest(open_checkpoint(checkpoint, loras=(lora,)), bundle) is None
    (bundle / "unet" / "model.onnx").write_bytes(b"damaged")
    assert unchanged_manifest(open_checkpoint(checkpoint), bundle) is None
    shutil.copytree(tiny_bundle, bundle, dirs_exist_ok=True)
    (checkpoint / "tokenizer" / "merges.txt").write_text("#version: 0.2\na c\n")
    assert unchanged_manifest(open_checkpoint(checkpoint), bundle) is None
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["versions"]["torch"] = "1.0"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert unchanged_manifest(open_checkpoint(checkpoint), bundle) is None


@pytest.mark.slow
def test_after_a_killed_export_there_is_no_bundle_and_the_next_one_cleans_up(
    killed_export: KilledExport, shared_checkpoint: Path
) -> None:
    assert killed_export.beside == (f".tiny.partial-{killed_export.pid}",)
    assert killed_export.written == ("reference.png", "scheduler", "text_encoder", "tokenizer", "unet")
    bundle = bundle_from_checkpoint(shared_checkpoint, killed_export.output)
    assert list(bundle.parent.iterdir()) == [bundle]
    verify(bundle, read_manifest(bundle))


def test_failed_export_keeps_the_older_bundle(tiny_bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    config = json.loads((checkpoint / "text_encoder" / "config.json").read_text())
    (checkpoint / "text_encoder" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError):
        bundle_from_checkpoint(checkpoint, bundle)
    verify(bundle, read_manifest(bundle))
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "tiny"}


def test_too_little_disk_is_noticed_before_anything_is_written(shared_checkpoint: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(shared_checkpoint)
    assert bundle_size_bytes(opened) > 4 * opened.parameters
    exabyte = Weights(files=(), variant=None, tensors={"x": TensorInfo(Path("x"), "F32", (10**9, 10**9))})
    larger = dataclasses.replace(opened, weights={**opened.weights, "unet": exabyte})
    with pytest.raises(BundleError, match=r"takes about 80000\d*\.\d GB, and the disk of .* has .* GB left"):
        bundle_from_checkpoint(larger, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_noticed_before_anything_is_written(
    shared_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container whose limit is far below the machine's memory."""
    opened = open_checkpoint(shared_checkpoint)
    assert export_memory_bytes(opened) < available_memory_bytes()
    cgroup = tmp_path / "cgroup"
    cgroup.mkdir()
    monkeypatch.setattr(room, "_CGROUP", cgroup)
    (cgroup / "memory.current").write_text("700000000\n")
    (cgroup / "memory.stat").write_text("anon 400000000\ninactive_file 100000000\n")
    (cgroup / "memory.max").write_text("max\n")
    assert available_memory_bytes() > 10**9
    (cgroup / "memory.max").write_text("1000000000\n")
    assert available_memory_bytes() == 400_000_000
    with pytest.raises(BundleError, match=r"takes about 1\.\d GB of memory, and 0\.4 GB are free"):
        bundle_from_checkpoint(opened, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == [cgroup]


def test_the_bundle_is_about_as_large_as_expected(tiny_bundle: Path, shared_checkpoint: Path) -> None:
    size_bytes = sum(file.stat().st_size for file in tiny_bundle.rglob("*") if file.is_file())
    assert 4 * open_checkpoint(shared_checkpoint).parameters < size_bytes
    assert size_bytes < bundle_size_bytes(open_checkpoint(shared_checkpoint))


@pytest.mark.parametrize("weights", ["unet/diffusion_pytorch_model", "text_encoder/model"])
def test_truncated_weights_leave_nothing_behind(checkpoint: Path, tmp_path: Path, weights: str) -> None:
    file = checkpoint / f"{weights}.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="is damaged or cut short"):
        bundle_from_checkpoint(checkpoint, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_output_that_is_no_bundle_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("mine")
    with pytest.raises(BundleError, match="is not a bundle, so it is not replaced"):
        bundle_from_checkpoint(checkpoint, tmp_path / "notes", force=True)
    assert (tmp_path / "notes" / "todo.txt").read_text() == "mine"


def test_staging_replaces_the_older_folder(tmp_path: Path) -> None:
    output = tmp_path / "name"
    output.mkdir()
    (output / "old").touch()
    with staged(output) as folder:
        (folder / "new").touch()
        assert (output / "old").exists()
    assert [path.name for path in output.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [output]


def test_staging_cleans_up_after_the_dead_only(tmp_path: Path) -> None:
    dead, alive = finished_process(), os.getppid()
    kept = [f".name.partial-{alive}", f".other.partial-{dead}", ".name.partial-x", f".name.other-{dead}"]
    for name in (*kept, f".name.partial-{dead}"):
        (tmp_path / name).mkdir()
    with staged(tmp_path / "name"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "name"}


def test_bundle_moved_aside_by_a_dead_export_comes_back(tmp_path: Path) -> None:
    """Killed between moving the older folder away and the new one in."""
    old = tmp_path / f".name.old-{finished_process()}"
    old.mkdir()
    (old / "manifest.json").touch()
    with pytest.raises(CheckpointError), staged(tmp_path / "name"):
        raise CheckpointError("stop")
    assert (tmp_path / "name" / "manifest.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, diffuserve_export.export_command, diffuserve_export.export, diffuserve_export.parity, diffuserve_export.preview;"
        "print({'torch', 'diffusers', 'transformers', 'onnx', 'onnxruntime', 'onnxscript'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr
