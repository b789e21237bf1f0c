"""A LoRA as it lies on the disk: one .safetensors file, or the folder that PEFT's save_pretrained() writes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from diffuserve.bundle.checksums import describe_file, sha256_of, sha256_of_files
from diffuserve.bundle.manifest import FusedLora
from diffuserve.errors import CheckpointError
from diffuserve_export.checkpoint.weights import parameters_in, sha256_of_weights

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Lora:
    """`path`: a .safetensors file or PEFT's folder; `scale`: how strongly it is applied, 1 as it was trained, 0 not at all."""

    path: Path
    scale: float

    def __str__(self) -> str:
        return f"{self.path.name}:{self.scale:g}"

    @property
    def weights(self) -> Path:
        """The file with the tensors."""
        return self.path / PEFT_WEIGHTS if self.path.is_dir() else self.path

    @property
    def config(self) -> Path | None:
        """PEFT's adapter_config.json, where there is one."""
        if self.weights.name != PEFT_WEIGHTS:
            return None
        path = self.weights.with_name(PEFT_CONFIG)
        return path if path.is_file() else None

    @cached_property
    def fused(self) -> FusedLora:
        """As the manifest names it."""
        weights_sha256 = sha256_of_weights(self.weights)
        if self.config is None:
            return FusedLora(self.path.stem, self.scale, sha256_of(self.weights), weights_sha256)
        files = [describe_file(self.weights.parent, file) for file in (self.weights, self.config)]
        name = self.weights.resolve().parent.name
        return FusedLora(name, self.scale, sha256_of_files(files), weights_sha256)


def lora_from_text(text: str) -> Lora:
    """`style.safetensors:0.8`, or without a scale, which then is 1. A name may have colons of its own.

    Raises:
        CheckpointError: there is no such file, it is not a safetensors file or is damaged, or the scale is not a number.
    """
    name, scale = text, 1.0
    if not Path(text).exists():
        name, colon, number = text.rpartition(":")
        if not colon:
            raise CheckpointError(f"--lora {text}: there is no file {text}.")
        scale = _scale(text, number)
    lora = Lora(Path(name), scale)
    if not lora.path.exists():
        raise CheckpointError(f"--lora {text}: there is no file {name}.")
    if not lora.weights.is_file():
        raise CheckpointError(
            f"--lora {text}: {name} is a folder without {PEFT_WEIGHTS}, which PEFT's save_pretrained() writes. Give a "
            ".safetensors file or such a folder."
        )
    if lora.path.name == PEFT_CONFIG:
        raise CheckpointError(f"--lora {text}: give the folder that {name} lies in, {lora.path.parent}.")
    if lora.weights.suffix.lower() != ".safetensors":
        raise CheckpointError(
            f"--lora {text}: only .safetensors files are read, since a pickle can run any code when it is opened."
        )
    parameters_in(lora.weights)
    return lora


def _scale(text: str, number: str) -> float:
    try:
        scale = float(number)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        comma = " Write a decimal point, not a comma." if "," in number else ""
        raise CheckpointError(
            f"--lora {text}: {number!r} is not a scale, and there is no file of that whole name. Give "
            f"FILE.safetensors:SCALE, SCALE a number such as 0.8.{comma}"
        )
    return scale
