"""A checkpoint: a folder in diffusers' format, opened without running anything that lies in it.

    tiny-emoji/
        model_index.json            the pipeline's class and its components'
        diffuserve.json             optional: {"steps": 20, "guidance_scale": 4.0, "sampler": "dpmpp_2m"}
        scheduler/scheduler_config.json
        text_encoder/config.json    and model.safetensors
        tokenizer/
        unet/config.json            and diffusion_pytorch_model.safetensors
        vae/config.json             and diffusion_pytorch_model.safetensors
        text_encoder_2/             and tokenizer_2/, in Stable Diffusion XL
        safety_checker/             and feature_extractor/, mostly in Stable Diffusion 1.x

Or a repository of that form on the Hugging Face hub; or one .safetensors file in the layout of the original code, which
holds all weights and lacks the rest: configs and tokenizers then come from a second checkpoint, and what the file says of
itself goes before them.

Opening reads JSON and the headers of the weights: no torch, and no code, pickled or otherwise, of the checkpoint's own.
(Only for a single file without configs diffusers is imported, which knows whose configs to take.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from diffuserve.bundle.checksums import describe_file, sha256_of, sha256_of_files
from diffuserve.bundle.manifest import File, FusedLora, ImageProcessor, ModelSpec
from diffuserve.errors import CheckpointError
from diffuserve.tensors import StageSpec
from diffuserve_export.checkpoint.arguments import export_arguments
from diffuserve_export.checkpoint.hub import folder_from_hub, is_hub_id
from diffuserve_export.checkpoint.model_index import (
    PIPELINES,
    SAFETY_PARTS,
    TWO_TEXT_ENCODERS,
    check_components,
    names_part,
    pipeline_of,
)
from diffuserve_export.checkpoint.model_spec import Defaults, model_spec_from_configs, stage_specs_from_configs
from diffuserve_export.checkpoint.safetensors_file import read_header
from diffuserve_export.checkpoint.safety import image_processor_from_configs
from diffuserve_export.checkpoint.single_file import (
    Said,
    clip_skip_by_file,
    config_of_single_file,
    said_by_file,
    settings_by_file,
)
from diffuserve_export.checkpoint.weights import STEMS, Weights, check_not_quantised, weights_in
from diffuserve_export.lora import Lora

_CONFIG_NAMES = {
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
    "feature_extractor": "preprocessor_config.json",
}
# Files beside the weights that are read.
_TEXTS = (".json", ".txt")
# What a single file is called, so that it is not looked for on the hub.
_FILES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
# What a pipeline makes of the scheduler's settings, whatever the checkpoint's file says.
_PIPELINE_SCHEDULER_SETTINGS = {"StableDiffusionPipeline": {"steps_offset": 1, "clip_sample": False}}


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint that can be exported.

    Attributes:
        path: the folder with the configs.
        pipeline: diffusers' class, a key of `diffuserve_export.checkpoint.model_index.PIPELINES`.
        spec: what requests to the model are measured by.
        tensors: those of each stage.
        configs: by component; the scheduler's with the settings that the pipeline gives it.
        weights: by component; empty for a single file, or where they were not asked for.
        single_file: the file with all weights, or None.
        loras: fused into the weights, in this order.
        image_processor: of the safety checker, None where there is none.
        safety_checker_left_out: the folder has one that is not to be exported.
        taken_from_file: settings that a single file has and the configs had otherwise, such as `scheduler.prediction_type`.
        exported_with: what it was opened with, as arguments of `diffuserve export`.
    """

    path: Path
    pipeline: str
    spec: ModelSpec
    tensors: Mapping[str, StageSpec]
    configs: Mapping[str, dict[str, Any]]
    weights: Mapping[str, Weights]
    single_file: Weights | None = None
    loras: tuple[Lora, ...] = ()
    image_processor: ImageProcessor | None = None
    safety_checker_left_out: bool = False
    taken_from_file: Mapping[str, Any] = field(default_factory=dict)
    exported_with: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """How many numbers the weights hold."""
        parts = [self.single_file] if self.single_file else self.weights.values()
        return sum(part.parameters for part in parts)

    @property
    def source(self) -> str:
        """Its name and those of the LoRAs."""
        return " + ".join([self.spec.name, *map(str, self.loras)])

    @cached_property
    def fused_loras(self) -> tuple[FusedLora, ...]:
        """The LoRAs as the manifest names them."""
        return tuple(lora.fused for lora in self.loras)

    @cached_property
    def file_sha256(self) -> str:
        """Of the single file; empty where there is none."""
        return sha256_of(self.single_file.files[0]) if self.single_file else ""

    @cached_property
    def sha256(self) -> str:
        """Identifies everything that an export reads: configs, tokenizer, weights and LoRAs."""
        texts = [file for part in self.configs for file in (self.path / part).iterdir() if file.suffix in _TEXTS]
        texts += [self.path / "model_index.json"]
        texts += [file for file in (self.path / "diffuserve.json",) if file.is_file()]
        weights = [file for part in self.weights.values() for file in part.files]
        files = [describe_file(self.path, file) for file in {*texts, *weights}]
        for file in self.single_file.files if self.single_file else ():
            files.append(File(file.name, file.stat().st_size, self.file_sha256))
        for position, (lora, fused) in enumerate(zip(self.loras, self.fused_loras, strict=True)):
            files.append(File(f"lora {position} {lora.scale!r}", lora.weights.stat().st_size, fused.sha256))
        return sha256_of_files(files)


def open_checkpoint(
    path: Path,
    *,
    config: Path | None = None,
    loras: tuple[Lora, ...] = (),
    clip_skip: int | None = None,
    safety_checker: bool = True,
    weights: bool = True,
    steps: int | None = None,
    guidance_scale: float | None = None,
    sampler: str | None = None,
) -> Checkpoint:
    """Opens a checkpoint.

    Args:
        path: a folder in diffusers' format, a .safetensors file in the original layout, or an id on the Hugging Face hub.
        config: for a single file: a folder in diffusers' format, or an id on the hub, of which only the configs and
            tokenizers are read; None takes those that diffusers takes for such a file, from the hub.
        loras: to fuse into the weights.
        clip_skip: layers of the text encoders to leave out, in diffusers' meaning; None for what a single file says of
            itself, else 0.
        safety_checker: whether to take the one that the checkpoint may have. A single file has none.
        weights: whether the checkpoint must have them; without, `Checkpoint.weights` is empty for a folder too.
        steps, guidance_scale, sampler: defaults of requests to this model; None takes those in diffuserve.json, else 20,
            7.5 and the scheduler's own.

    Raises:
        CheckpointError: it is none, or it needs something that is not supported; what, and how to fix it.
    """
    given = {"steps": steps, "guidance_scale": guidance_scale, "sampler": sampler}
    exported_with = export_arguments(path, config, loras, safety_checker, clip_skip=clip_skip, **given)
    single_file, said = _open_single_file(path) if path.is_file() else (None, Said())
    if single_file:
        name, folder = path.stem, _config_folder(single_file, said, config)
    else:
        name, folder = _locate(path, config, weights)
    index = _read_json(folder / "model_index.json")
    pipeline = pipeline_of(folder, index)
    parts = PIPELINES[pipeline]
    # The default is that of StableDiffusionXLPipeline, which alone has the setting.
    zero_empty_negative = parts is TWO_TEXT_ENCODERS and bool(index.get("force_zeros_for_empty_prompt", True))
    has_safety_checker = single_file is None and names_part(index, "safety_checker")
    if has_safety_checker and safety_checker:
        parts = {**parts, **SAFETY_PARTS}
    check_components(folder, index, parts)
    configs = {part: _read_json(folder / part / _CONFIG_NAMES.get(part, "config.json")) for part in parts}
    configs["scheduler"] |= _PIPELINE_SCHEDULER_SETTINGS.get(pipeline, {})
    settings: dict[str, Any] = {}
    if single_file:
        settings = settings_by_file(path, said, configs, folder)
        for setting, value in settings.items():
            part, _, key = setting.partition(".")
            configs[part][key] = value
        if clip_skip is None and (by_file := clip_skip_by_file(said, two_encoders="text_encoder_2" in parts)):
            settings["clip_skip"] = clip_skip = by_file
    defaults = msgspec.structs.replace(
        _read_defaults(folder), **{key: value for key, value in given.items() if value is not None}
    )
    spec = model_spec_from_configs(
        name,
        configs,
        defaults,
        clip_skip=clip_skip or 0,
        zero_empty_negative=zero_empty_negative,
    )
    with_weights = [part for part in parts if part in STEMS] if weights and not single_file else []
    image_processor = image_processor_from_configs(name, configs) if "safety_checker" in configs else None
    tensors = stage_specs_from_configs(spec, configs, image_processor)
    return Checkpoint(
        folder,
        pipeline,
        spec,
        tensors,
        configs,
        {part: weights_in(folder / part, STEMS[part]) for part in with_weights},
        single_file,
        loras,
        image_processor=image_processor,
        safety_checker_left_out=has_safety_checker and not safety_checker,
        taken_from_file=settings,
        exported_with=exported_with,
    )


def _open_single_file(path: Path) -> tuple[Weights, Said]:
    header = read_header(path)
    check_not_quantised(path, header.tensors)
    return Weights((path,), None, header.tensors), said_by_file(path, header)


def _config_folder(single_file: Weights, said: Said, config: Path | None) -> Path:
    if config is not None:
        return _folder(config, weights=False)
    (path,) = single_file.files
    repo_id = config_of_single_file(path, single_file.tensors, said)
    try:
        return folder_from_hub(repo_id, weights=False)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} holds weights only. Its configs and tokenizers would come from {repo_id}, which diffusers takes for "
            f"such a file, but: {error} Or name a folder in diffusers' format of the same kind of model, of which only "
            "these are read: --config FOLDER"
        ) from error


def _locate(path: Path, config: Path | None, weights: bool) -> tuple[str, Path]:
    """The model's name and the folder of a checkpoint that is not a single file."""
    if config is not None:
        raise CheckpointError(
            f"--config is for a single .safetensors file, and {path} is none: a folder in diffusers' format has configs "
            "of its own. Leave it out."
        )
    return path.resolve().name, _folder(path, weights=weights)


def _folder(path: Path, *, weights: bool) -> Path:
    """The folder in diffusers' format that `path` is, or that a repository of that name is downloaded to."""
    if not path.exists():
        if path.suffix.lower() in _FILES:
            raise CheckpointError(f"There is no file {path}.")
        if is_hub_id(str(path)):
            return folder_from_hub(str(path), weights=weights)
        raise CheckpointError(
            f"There is no folder {path}. Give the folder of a checkpoint in diffusers' format, a .safetensors file, or "
            "an id on the Hugging Face hub, OWNER/NAME."
        )
    if not (path / "model_index.json").is_file():
        raise CheckpointError(
            f"{path} is not in diffusers' format: it has no model_index.json. Give the folder that the pipeline's "
            "save_pretrained() wrote, or a single .safetensors file."
        )
    return path


def _read_defaults(folder: Path) -> Defaults:
    file = folder / "diffuserve.json"
    if not file.is_file():
        return Defaults()
    try:
        return msgspec.json.decode(file.read_bytes(), type=Defaults)
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{file} is wrong: {error}. Allowed: {', '.join(Defaults.__struct_fields__)}.") from error


def _read_json(file: Path) -> dict[str, Any]:
    """As Python reads it: diffusers writes -Infinity, which JSON does not know."""
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing. Download or save the checkpoint again.") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}. Download or save the checkpoint again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is damaged: it holds no object. Download or save the checkpoint again.")
    return content
