"""The checkpoints of tests/export/tiny.py as single files."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from diffuserve_export.checkpoint.checkpoint import open_checkpoint
from diffuserve_export.checkpoint.load import model_from_checkpoint
from diffuserve_export.checkpoint.loaded_model import LoadedModel
from diffuserve_export.quiet import quiet
from tests.export.original_layout import write_single_file
from tests.export.tiny import WRITERS

Tensors = dict[str, Any]


@dataclass(frozen=True)
class SingleFile:
    """The same weights as one file and as a folder, and that folder without weights."""

    path: Path
    folder: Path
    configs: Path
    tensors: Tensors

    def load(self, tensors: Tensors, path: Path) -> LoadedModel:
        """The model from a file of other tensors, with the same configs."""
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path)
        return model_from_checkpoint(open_checkpoint(path, config=self.configs))


def make_single_file(family: str, root: Path) -> SingleFile:
    """Args:
    family: a key of `WRITERS`.
    root: an empty folder.
    """
    folder = make_distinct(WRITERS[family](root / "folder"))
    with quiet():
        from diffusers import DiffusionPipeline

        pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    path = write_single_file(pipeline, root / "my model.safetensors")
    configs = Path(shutil.copytree(folder, root / "configs", ignore=shutil.ignore_patterns("*.safetensors")))
    return SingleFile(path, folder, configs, load_file(path))


def make_distinct(folder: Path) -> Path:
    """Gives a checkpoint other biases and norms than zeros and ones, so that no two tensors are the same."""
    random = np.random.default_rng(0)
    for file in sorted(folder.glob("*/*.safetensors")):
        tensors = {
            name: array + np.float32(0.1) * random.standard_normal(array.shape, np.float32)
            if array.min() == array.max()
            else array
            for name, array in load_file(file).items()
        }
        save_file(tensors, file, metadata={"format": "pt"})
    return folder
