"""A checkpoint: a folder in diffusers' format, opened without running anything that lies in it.

    tiny-emoji/
        model_index.json            the pipeline's class and its components'
        diffuserve.json             optional: {"steps": 20, "guidance_scale": 4.0, "sampler": "dpmpp_2m"}
        scheduler/scheduler_config.json
        text_encoder/config.json    and model.safetensors
        tokenizer/
        unet/config.json            and diffusion_pytorch_model.safetensors
        vae/config.json             and diffusion_pytorch_model.safetensors

Opening reads JSON and the headers of the weights: no torch, and no code, pickled or otherwise, of the checkpoint's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from diffuserve.bundle import ModelSpec, describe_file, sha256_of_files
from diffuserve.errors import CheckpointError
from diffuserve_export.model_spec import Defaults, model_spec_from_configs

PIPELINES = ("StableDiffusionPipeline",)
# Component: the classes that it may have, as model_index.json names them.
COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "scheduler": (),  # any: only its settings are read, and those are checked
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
}
# Loaded by the pipeline, but none of its images depend on them.
_IGNORED = ("safety_checker", "feature_extractor")
_CONFIG_NAMES = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
_WEIGHTS_NAMES = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
_PICKLED = (".bin", ".ckpt", ".pt", ".pth")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint that can be exported: `configs` by component, `weights` its safetensors files."""

    path: Path
    spec: ModelSpec
    configs: Mapping[str, dict[str, Any]]
    weights: tuple[Path, ...]

    @cached_property
    def sha256(self) -> str:
        """Identifies everything that an export reads: configs, tokenizer and weights."""
        texts = [
            file for part in COMPONENTS for file in (self.path / part).iterdir() if file.suffix in (".json", ".txt")
        ]
        texts += [self.path / "model_index.json"]
        texts += [file for file in (self.path / "diffuserve.json",) if file.is_file()]
        return sha256_of_files(describe_file(self.path, file) for file in {*texts, *self.weights})


def sha256_of_checkpoint(path: Path) -> str:
    """`Checkpoint.sha256` of the folder `path`."""
    return open_checkpoint(path).sha256


def open_checkpoint(path: Path, *, guidance_scale: float | None = None) -> Checkpoint:
    """Opens a folder in diffusers' format.

    Args:
        path: the folder.
        guidance_scale: the default of requests to this model; None takes the one in diffuserve.json, else 7.5.

    Raises:
        CheckpointError: it is not one, or it needs something that is not supported; what, and how to mend it.
    """
    _check_is_folder(path)
    index = _read_json(path / "model_index.json")
    _check_index(path, index)
    configs = {part: _read_json(path / part / _CONFIG_NAMES.get(part, "config.json")) for part in COMPONENTS}
    spec = model_spec_from_configs(path.resolve().name, configs, _read_defaults(path))
    if guidance_scale is not None:
        spec = msgspec.structs.replace(spec, default_guidance_scale=guidance_scale)
    weights = tuple(file for part, name in _WEIGHTS_NAMES.items() for file in _weights_of(path / part, name))
    return Checkpoint(path, spec, configs, weights)


def _check_is_folder(path: Path) -> None:
    if path.is_file():
        raise CheckpointError(
            f"{path} is a single file; a checkpoint is a folder in diffusers' format. Convert it: "
            'python -c "from diffusers import StableDiffusionPipeline as P; '
            f"P.from_single_file('{path}').save_pretrained('{path.with_suffix('')}')\""
        )
    if not path.exists():
        if _HUB_ID.fullmatch(str(path)):
            raise CheckpointError(
                f"There is no folder {path}. If it is a name on the Hugging Face hub, download it first: "
                f"hf download {path} --local-dir {path.name}, then export {path.name}."
            )
        raise CheckpointError(f"There is no folder {path}. Give the folder of a checkpoint in diffusers' format.")
    if not (path / "model_index.json").is_file():
        raise CheckpointError(
            f"{path} is not in diffusers' format: it has no model_index.json. Give the folder that "
            "StableDiffusionPipeline.save_pretrained() wrote."
        )


def _check_index(path: Path, index: Mapping[str, Any]) -> None:
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise CheckpointError(
            f"{path} is a {pipeline}, which is not supported. Supported: {', '.join(PIPELINES)} "
            "(Stable Diffusion 1.x and 2.x)."
        )
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, list) or part in _IGNORED or entry == [None, None]:
            continue
        if part not in COMPONENTS:
            raise CheckpointError(
                f"{path} has the component {part} ({entry[-1]}), which is not supported. "
                f"Supported: {', '.join(COMPONENTS)}."
            )
        classes = COMPONENTS[part]
        if entry[0] not in ("diffusers", "transformers") or (classes and entry[1] not in classes):
            raise CheckpointError(
                f"{path}: the {part} is of the class {'.'.join(map(str, entry))}. Supported: "
                f"{', '.join(classes) or 'the schedulers of diffusers'}; a checkpoint's own code is never run."
            )
    for part in COMPONENTS:
        if not index.get(part) or index[part] == [None, None] or not (path / part).is_dir():
            raise CheckpointError(
                f"{path} lacks the component {part}: it must be named in model_index.json and have a folder of that "
                f"name. Needed: {', '.join(COMPONENTS)}. Download or save the checkpoint again."
            )


def _read_defaults(path: Path) -> Defaults:
    file = path / "diffuserve.json"
    if not file.is_file():
        return Defaults()
    try:
        return msgspec.json.decode(file.read_bytes(), type=Defaults)
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{file} is wrong: {error}. Allowed: {', '.join(Defaults.__struct_fields__)}.") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing. Download or save the checkpoint again.") from None
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{file} is damaged: {error}. Download or save the checkpoint again.") from error


def _weights_of(folder: Path, name: str) -> tuple[Path, ...]:
    """The safetensors files that hold a component's weights, their headers checked."""
    index = folder / f"{name}.index.json"
    if (folder / name).is_file():
        files: tuple[Path, ...] = (folder / name,)
    elif index.is_file():  # sharded
        shards = _read_json(index).get("weight_map", {}).values()
        files = (index, *(folder / shard for shard in sorted(set(shards))))
    else:
        raise CheckpointError(_no_weights(folder, name))
    for file in files:
        if not file.resolve().is_relative_to(folder.resolve()) and not file.is_symlink():
            raise CheckpointError(f"{index} names {file}, which lies outside its folder. Do not use this checkpoint.")
        if file.suffix == ".safetensors":
            _check_header(file)
    return files


def _no_weights(folder: Path, name: str) -> str:
    found = sorted(file.name for file in folder.iterdir() if file.suffix in (*_PICKLED, ".safetensors"))
    if any(file.endswith(_PICKLED) for file in found):
        return (
            f"{folder} has its weights as a pickle ({', '.join(found)}), which can run any code when it is opened; only "
            f'safetensors are read. If you trust the checkpoint, convert it: python -c "from diffusers import '
            f"StableDiffusionPipeline as P; P.from_pretrained('{folder.parent}', use_safetensors=False)"
            f".save_pretrained('{folder.parent}-safetensors')\""
        )
    hint = f" Found: {', '.join(found)}; rename the one you want to {name}." if found else ""
    return f"{folder} has no {name}.{hint or ' Download or save the checkpoint again.'}"


def _check_header(file: Path) -> None:
    """Opening maps the file and compares its length with the header's: no weights are read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or cut short: {error}. Download it again.") from error
