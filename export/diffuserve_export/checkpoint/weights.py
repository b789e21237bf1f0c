"""Files of weights: which of a folder's are to be read, and what can be told of them without reading the weights.

Only safetensors are read. Where a component has its weights in full precision and as the fp16 variant, the former are
taken; everything is exported from fp32 in either case.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from diffuserve.bundle.checksums import sha256_of
from diffuserve.errors import CheckpointError
from diffuserve_export.checkpoint.safetensors_file import TensorInfo, read_header

# Component: the name of its weights without suffix, as diffusers and transformers save them.
STEMS: Mapping[str, str] = {
    "text_encoder": "model",
    "text_encoder_2": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "safety_checker": "model",
}
# Types that hold the weights themselves, in safetensors' names.
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# Counters and positions have these. What a number of any other type means depends on others beside it.
_INTEGERS = ("I64", "I32", "I16", "U64", "U32", "U16", "BOOL")
_PICKLED = (".bin", ".ckpt", ".pt", ".pth")


@dataclass(frozen=True)
class Weights:
    """The weights of one component, or of a whole single-file checkpoint.

    `files`: the safetensors files, and the index if there are several; `variant`: fp16, or None for full precision;
    `tensors`: by name.
    """

    files: tuple[Path, ...]
    variant: str | None
    tensors: Mapping[str, TensorInfo]

    @property
    def parameters(self) -> int:
        """How many numbers they hold."""
        return sum(tensor.size for tensor in self.tensors.values())


def _names(stem: str) -> dict[str, str | None]:
    """What the file to open may be called, whole weights or the index of shards, with its variant; the best first."""
    return {
        f"{stem}.safetensors": None,
        f"{stem}.safetensors.index.json": None,
        f"{stem}.fp16.safetensors": "fp16",
        f"{stem}.safetensors.index.fp16.json": "fp16",
        f"{stem}.safetensors.fp16.index.json": "fp16",  # diffusers' until the summer of 2024
        f"{stem}.fp16.safetensors.index.json": "fp16",
    }


def choose_weights(names: Collection[str], stem: str) -> tuple[str, str | None] | None:
    """The file to open of those in a component's folder, and its variant; None if there is none. Upper and lower case are
    one."""
    by_name = {name.lower(): name for name in names}
    return next(((by_name[name], variant) for name, variant in _names(stem).items() if name in by_name), None)


def is_shard_of(name: str, stem: str, variant: str | None) -> bool:
    """Whether a file is one of several that hold a component's weights, such as model-00001-of-00002.safetensors. A
    variant's are model.fp16-00001-of-00002.safetensors, or, from before the summer of 2024,
    model-00001-of-00002.fp16.safetensors."""
    shard, dotted = r"-\d+-of-\d+", re.escape(f".{variant}") if variant else ""
    return re.fullmatch(rf"{stem}({dotted}{shard}|{shard}{dotted})\.safetensors", name, re.IGNORECASE) is not None


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
    if not name.lower().endswith(".json"):
        return Weights((file,), variant, tensors_in(file))
    shards = tuple(folder / shard for shard in sorted(set(_weight_map(file).values())))
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        if not shard.resolve().is_relative_to(folder.resolve()) and not shard.is_symlink():
            raise CheckpointError(f"{file} names {shard}, which lies outside its folder. Do not use this checkpoint.")
        if not shard.is_file():
            raise CheckpointError(f"{shard} is missing, and {file.name} names it. Download the checkpoint again.")
        found = tensors_in(shard)
        if twice := sorted(found.keys() & tensors.keys()):
            raise CheckpointError(
                f"{shard} has {listed(twice)}, and so has another shard. Download or save the checkpoint again."
            )
        tensors |= found
    return Weights((file, *shards), variant, tensors)


def tensors_in(file: Path) -> Mapping[str, TensorInfo]:
    """A safetensors file's tensors, from its header.

    Raises:
        CheckpointError: it is damaged or no such file. Or its weights are quantised.
    """
    tensors = read_header(file).tensors
    check_not_quantised(file, tensors)
    return tensors


def check_not_quantised(file: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Raises CheckpointError where a tensor is of a type that does not hold weights themselves."""
    quantised = {name: tensor.dtype for name, tensor in tensors.items() if tensor.dtype not in (*FLOATS, *_INTEGERS)}
    if quantised:
        raise CheckpointError(
            f"{file} has weights in {' and '.join(sorted(set(quantised.values())))}, so they are quantised in some way "
            f"that the file does not tell: {listed(quantised)}. Take the checkpoint in fp32, bf16 or fp16."
        )


def parameters_in(file: Path) -> int:
    """How many numbers a safetensors file holds; raises as `tensors_in`."""
    return sum(tensor.size for tensor in tensors_in(file).values())


def listed(names: Collection[str]) -> str:
    """The first of them, for a message."""
    first = sorted(names)[:3]
    return ", ".join(first) + (f" and {len(names) - len(first)} more" if len(names) > len(first) else "")


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


def _no_weights(folder: Path, stem: str) -> str:
    found = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in (*_PICKLED, ".safetensors"))
    if any(file.lower().endswith(_PICKLED) for file in found):
        return (
            f"{folder} has its weights as a pickle ({', '.join(found)}), which can run any code when it is opened; only "
            f'safetensors are read. If you trust the checkpoint, convert it: python -c "from diffusers import '
            f"DiffusionPipeline as P; P.from_pretrained('{folder.parent}', use_safetensors=False)"
            f".save_pretrained('{folder.parent}-safetensors')\""
        )
    hint = f" Found: {', '.join(found)}; rename the one you want to {stem}.safetensors." if found else ""
    return f"{folder} has no {stem}.safetensors.{hint or ' Download or save the checkpoint again.'}"
