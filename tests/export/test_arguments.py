"""What an export was given stands in the bundle, so that it can be made again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from diffuserve.bundle.manifest import read_manifest
from diffuserve_export.checkpoint.arguments import export_arguments
from diffuserve_export.checkpoint.checkpoint import open_checkpoint
from diffuserve_export.export_command import command
from diffuserve_export.lora import Lora


def test_a_bundle_tells_it(shared_checkpoint: Path, tiny_bundle: Path) -> None:
    assert read_manifest(tiny_bundle).exported_with == (shared_checkpoint.name,)


def test_everything_that_changes_a_bundle_is_told(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    loras = (Lora(tmp_path / "style.safetensors", 0.8), Lora(tmp_path / "light", -1.0))
    told = export_arguments(
        file, Path("owner/name"), loras, False, clip_skip=0, steps=8, guidance_scale=4.5, sampler="euler"
    )
    given = command.make_context("export", list(told)).params
    assert str(tmp_path) not in " ".join(told)
    assert {name: value for name, value in given.items() if value is not None and value is not False} == {
        "checkpoint": Path("model.safetensors"),
        "config": Path("owner/name"),
        "loras": ("style.safetensors:0.8", "light:-1"),
        "clip_skip": 0,
        "no_safety_checker": True,
        "steps": 8,
        "guidance_scale": 4.5,
        "sampler": "euler",
    }


def test_the_same_arguments_open_the_same_checkpoint(
    shared_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(shared_checkpoint, tmp_path / "tiny")
    opened = open_checkpoint(tmp_path / "tiny", steps=5, sampler="euler", clip_skip=0)
    monkeypatch.chdir(tmp_path)
    given = command.make_context("export", list(opened.exported_with)).params
    again = open_checkpoint(
        given["checkpoint"], steps=given["steps"], sampler=given["sampler"], clip_skip=given["clip_skip"]
    )
    assert (again.spec, again.exported_with) == (opened.spec, opened.exported_with)
