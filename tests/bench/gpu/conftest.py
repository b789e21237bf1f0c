"""A small model whose speed can be measured, and a place to write figures to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from diffuserve.bundle.manifest import write_manifest
from diffuserve_bench.gpu.record import PhaseRecord, Recorder, read_lines
from diffuserve_bench.gpu.settings import Settings
from tests.core.fakes import MODEL
from tests.core.tiny_graphs import make_real_bundle

_UNET = {
    "sample_size": 8,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": MODEL.hidden_size,
    "attention_head_dim": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
}
_VAE = {
    "block_out_channels": [8, 8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A bundle whose graphs run, with configs for diffusers beside them."""
    folder = tmp_path / "model"
    folder.mkdir()
    manifest = make_real_bundle(folder)
    scheduler = {**manifest.scheduler, "steps_offset": 1}
    write_manifest(folder, msgspec.structs.replace(manifest, scheduler=scheduler))
    for part, config in (("unet", _UNET), ("vae", _VAE)):
        (folder / part).mkdir(exist_ok=True)
        (folder / part / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def settings(model: Path, tmp_path: Path) -> Settings:
    """A dry run's."""
    (tmp_path / "work").mkdir()
    return Settings("cpu", tmp_path / "work", model=model, bundle=model)


class Written:
    """A phase's record, and what has been written to it."""

    def __init__(self, path: Path, recorder: Recorder) -> None:
        self._path = path
        self.record = PhaseRecord(recorder, "phase")

    @property
    def lines(self) -> list[dict[str, Any]]:
        return read_lines([self._path])

    @property
    def parts(self) -> list[str]:
        """Why parts were skipped or failed."""
        return [line["reason"] for line in self.lines if line["kind"] == "part"]

    def values(self, figure: str, unit: str, **settings: Any) -> list[float]:
        """Those of a figure whose settings include `settings`."""
        return [
            line["value"]
            for line in self.lines
            if line["kind"] == "figure"
            and (line["figure"], line["unit"]) == (figure, unit)
            and settings.items() <= line["settings"].items()
        ]


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Written]:
    """Its record also writes to standard output's place, which here is nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with Recorder(tmp_path / "figures.jsonl", nowhere) as recorder:
        yield Written(tmp_path / "figures.jsonl", recorder)
    os.close(nowhere)
