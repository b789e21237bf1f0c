"""The checkpoint's weights as PyTorch modules, in fp32."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffuserve.errors import CheckpointError
from diffuserve_export.checkpoint.accounting import fill
from diffuserve_export.checkpoint.checkpoint import Checkpoint
from diffuserve_export.checkpoint.diffusers_layout import ignored_in_folder, origins_in_folder
from diffuserve_export.checkpoint.loaded_model import LoadedModel
from diffuserve_export.checkpoint.original_layout import ignored_in_original, origins_in_original
from diffuserve_export.checkpoint.weights import STEMS
from diffuserve_export.lora import fuse_loras
from diffuserve_export.quiet import hide_progress_bars, quiet

if TYPE_CHECKING:
    pass


# How diffusers' EMAModel took the moving average of the weights, which it saves with the model's settings.
_SETTINGS_OF_AVERAGE = (
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
)


def model_from_checkpoint(checkpoint: Checkpoint) -> LoadedModel:
    """Loads the components one by one instead of the pipeline, which would also load what is never exported.

    Raises:
        CheckpointError: a file is damaged, its weights are not those that its config describes, or a LoRA does not fit.
    """
    with quiet():
        hide_progress_bars()
        tokenizers = tokenizers_from_checkpoint(checkpoint)
        model = LoadedModel(**tokenizers, **_load_modules(checkpoint))
        _check_vocabulary(checkpoint.path, model.tokenizer, model.text_encoder)
        if model.tokenizer_2 is not None:
            _check_vocabulary(checkpoint.path, model.tokenizer_2, model.text_encoder_2)
        fuse_loras(model, checkpoint.loras)
    return model


def tokenizers_from_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Those of transformers, by component.

    Raises:
        CheckpointError: a tokenizer is missing or damaged.
    """
    from transformers import CLIPTokenizer

    parts = [part for part in ("tokenizer", "tokenizer_2") if part in checkpoint.configs]
    return {part: _load_tokenizer(CLIPTokenizer, checkpoint.path / part) for part in parts}


def _load_modules(checkpoint: Checkpoint) -> dict[str, Any]:
    modules = empty_modules(checkpoint)
    if checkpoint.single_file:
        names = checkpoint.single_file.tensors.keys()
        fill(
            modules,
            origins_in_original(modules, names),
            checkpoint.single_file,
            ignored=ignored_in_original(modules, names),
            where=checkpoint.single_file.files[0],
            fix=f"The configs are those of {checkpoint.path}: if they are of another kind of model, name a folder of the "
            "same kind by --config.",
        )
    for part, weights in checkpoint.weights.items():
        module, names = modules[part], weights.tensors.keys()
        fill(
            {part: module},
            {part: origins_in_folder(part, module, names)},
            weights,
            ignored=ignored_in_folder(part, module, names),
            where=checkpoint.path / part,
            fix="Download or save the checkpoint again.",
        )
    return {part: module.eval().requires_grad_(False) for part, module in modules.items()}


def empty_modules(checkpoint: Checkpoint) -> dict[str, Any]:
    """The components by their configs, without weights nor memory for them.

    Raises:
        CheckpointError: a config cannot be made a module of.
    """
    return {part: _empty_module(checkpoint, part) for part in STEMS if part in checkpoint.configs}


def _empty_module(checkpoint: Checkpoint, part: str) -> Any:
    """A component without weights, nor memory for them."""
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    classes: dict[str, Any] = {
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "safety_checker": StableDiffusionSafetyChecker,
    }
    model_class, folder, config = classes[part], checkpoint.path / part, checkpoint.configs[part]
    of_diffusers = part in ("unet", "vae")
    if of_diffusers:
        _check_known(folder, config, inspect.signature(model_class).parameters)
    try:
        with init_empty_weights():
            if of_diffusers:
                return model_class.from_config(config)
            return model_class(model_class.config_class.from_pretrained(folder, local_files_only=True))
    except Exception as error:  # each library raises errors of its own
        raise CheckpointError(f"{folder} cannot be loaded: {error}. Download or save the checkpoint again.") from error


def _check_known(folder: Path, config: Mapping[str, Any], known: Collection[str]) -> None:
    """diffusers ignores settings that it does not know, and would make another model than the one that was trained."""
    for name, value in config.items():
        if value and not name.startswith("_") and name not in known and name not in _SETTINGS_OF_AVERAGE:
            raise CheckpointError(
                f"{folder}/config.json has {name}={value!r}, which this version of diffusers does not know. Update diffusers; "
                f"or if the model can be drawn with without it, remove {name} there."
            )


def _load_tokenizer(tokenizer_class: Any, folder: Path) -> Any:
    # Without either transformers would make a tokenizer that knows no words.
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise CheckpointError(
            f"{folder} has neither tokenizer.json nor vocab.json and merges.txt. Download or save the checkpoint again."
        )
    try:
        return tokenizer_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be loaded: {error}. Download or save the checkpoint again.") from error


def _check_vocabulary(path: Path, tokenizer: Any, text_encoder: Any) -> None:
    entries, vocabulary = len(tokenizer), text_encoder.config.vocab_size
    if entries > vocabulary:
        raise CheckpointError(
            f"{path}: the tokenizer has {entries} tokens and the text encoder embeds {vocabulary}. They do not belong "
            "together; save the checkpoint again."
        )
