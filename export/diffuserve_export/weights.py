"""Files of weights: which of a folder's are to be read, and what can be told of them without reading the weights.

Only safetensors are read. Where a component has its weights in full precision and as the fp16 variant, the former are
taken; everything is exported from fp32 in either case.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from diffuserve.bundle import sha256_of
from diffuserve.errors import CheckpointError

# Component: the name of its weights without suffix, as diffusers and transformers save them.
STEMS: Mapping[str, str] = {
    "text_encoder": "model",
    "text_encoder_2": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "safety_checker": "model",
}
_VARIANTS = (None, "fp16")
# What 8 bits mean depends on numbers beside them; every other type holds the weights themselves.
_QUANTISED = {"I8", "U8"}
_PICKLED = (".bin", ".ckpt", ".pt", ".pth")


@dataclass(frozen=True)
class Weights:
    """The weights of one component, or of a whole single-file checkpoint.

    `files`: the safetensors files, and the index if there are several; `variant`: fp16, or None for full precision;
    `parameters`: how many numbers they hold.
    """

    files: tuple[Path, ...]
    variant: str | None
    parameters: int


def choose_weights(names: Collection[str], stem: str) -> tuple[str, str | None] | None:
    """The file to open of those in a component's folder, whole weights or the index of shards, and its variant; None if
    there is none."""
    for variant in _VARIANTS:
        for name in (f"{stem}.safetensors", f"{stem}.safetensors.index.json"):
            if _with_variant(name, variant) in names:
                return _with_variant(name, variant), variant
    return None


def is_shard_of(name: str, stem: str, variant: str | None) -> bool:
    """Whether a file is one of several that hold a component's weights, such as model-00001-of-00002.safetensors."""
    return name.startswith(f"{stem}.{variant}-" if variant else f"{stem}-") and name.endswith(".safetensors")


def weights_in(folder: Path, stem: str) -> Weights:
    """A component's weights, the headers of the files checked.

    Raises:
        CheckpointError: there are none, only pickled ones, or a file is damaged.
    """
    chosen = choose_weights({file.name for file in folder.iterdir()}, stem)
    if chosen is None:
        raise CheckpointError(_no_weights(folder, stem))
    name, variant = chosen
    file = folder / name
    if file.suffix != ".json":
        return Weights((file,), variant, parameters_in(file))
    shards = tuple(folder / shard for shard in sorted(set(_weight_map(file).values())))
    for shard in shards:
        if not shard.resolve().is_relative_to(folder.resolve()) and not shard.is_symlink():
            raise CheckpointError(f"{file} names {shard}, which lies outside its folder. Do not use this checkpoint.")
    return Weights((file, *shards), variant, sum(map(parameters_in, shards)))


def parameters_in(file: Path) -> int:
    """How many numbers a safetensors file holds, from its header.

    Raises:
        CheckpointError: it is damaged; its length is compared with what the header says. Or its weights are quantised.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            parts = [tensors.get_slice(name) for name in tensors.keys()]  # noqa: SIM118
            dtypes = {part.get_dtype() for part in parts}
            parameters = sum(math.prod(part.get_shape()) for part in parts)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or cut short: {error}. Download it again.") from error
    if quantised := sorted(dtypes & _QUANTISED):
        raise CheckpointError(
            f"{file} has weights in {' and '.join(quantised)}, so they are quantised in some way that the file does not "
            "tell. Take the checkpoint in fp32, bf16 or fp16."
        )
    return parameters


def sha256_of_weights(file: Path) -> str:
    """SHA-256 of what follows the header of a safetensors file, in hex: kohya's trainers and the programs that read their
    files know a LoRA by it, since it stays the same when the metadata are edited."""
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
    return sha256_of(file, 8 + header_bytes)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{index} is damaged: {error}. Download or save the checkpoint again.") from error


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _with_variant(name: str, variant: str | None) -> str:
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}" if variant else name


def _no_weights(folder: Path, stem: str) -> str:
    found = sorted(file.name for file in folder.iterdir() if file.suffix in (*_PICKLED, ".safetensors"))
    if any(file.endswith(_PICKLED) for file in found):
        return (
            f"{folder} has its weights as a pickle ({', '.join(found)}), which can run any code when it is opened; only "
            f'safetensors are read. If you trust the checkpoint, convert it: python -c "from diffusers import '
            f"DiffusionPipeline as P; P.from_pretrained('{folder.parent}', use_safetensors=False)"
            f".save_pretrained('{folder.parent}-safetensors')\""
        )
    hint = f" Found: {', '.join(found)}; rename the one you want to {stem}.safetensors." if found else ""
    return f"{folder} has no {stem}.safetensors.{hint or ' Download or save the checkpoint again.'}"
