"""The checkpoint's weights as PyTorch modules, in fp32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffuserve.errors import CheckpointError
from diffuserve_export.checkpoint import Checkpoint
from diffuserve_export.lora import fuse_loras
from diffuserve_export.quiet import hide_progress_bars, quiet

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


@dataclass(frozen=True)
class LoadedModel:
    """The parts of a Stable Diffusion pipeline that are exported, in evaluation mode and without gradients.

    The second text encoder and its tokenizer are Stable Diffusion XL's.
    """

    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: CLIPTokenizer | None = None
    safety_checker: StableDiffusionSafetyChecker | None = None

    @property
    def tokenizers(self) -> dict[str, CLIPTokenizer]:
        """By component."""
        first = {"tokenizer": self.tokenizer}
        return first if self.tokenizer_2 is None else {**first, "tokenizer_2": self.tokenizer_2}

    def pipeline(self) -> Any:
        """diffusers' pipeline of these parts, without a scheduler.

        Latent consistency models get StableDiffusionPipeline too: it conditions their UNet in the same way, and takes any
        scheduler.
        """
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

        parts: dict[str, Any] = {
            "vae": self.vae,
            "unet": self.unet,
            "text_encoder": self.text_encoder,
            "tokenizer": self.tokenizer,
            "scheduler": None,
        }
        if self.text_encoder_2 is None:
            return StableDiffusionPipeline(
                **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
        return StableDiffusionXLPipeline(
            **parts, text_encoder_2=self.text_encoder_2, tokenizer_2=self.tokenizer_2, add_watermarker=False
        )


def model_from_checkpoint(checkpoint: Checkpoint) -> LoadedModel:
    """Loads the components one by one instead of the pipeline, which would also load what is never exported.

    Raises:
        CheckpointError: a file is damaged, its weights are not those that its config describes, or a LoRA does not fit.
    """
    with quiet():
        hide_progress_bars()
        tokenizers = tokenizers_from_checkpoint(checkpoint)
        model = LoadedModel(**tokenizers, **_load_modules(checkpoint, tokenizers))
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


def _load_modules(checkpoint: Checkpoint, tokenizers: dict[str, Any]) -> dict[str, Any]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    from diffuserve_export.single_file import parts_of_single_file

    classes = {
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "safety_checker": StableDiffusionSafetyChecker,
    }
    if checkpoint.single_file:
        (file,) = checkpoint.single_file.files
        modules = parts_of_single_file(file, checkpoint, tokenizers)
    else:
        modules = {
            part: _load(classes[part], checkpoint.path / part, weights.variant)
            for part, weights in checkpoint.weights.items()
        }
    return {part: module.float().eval().requires_grad_(False) for part, module in modules.items()}


def _load(model_class: Any, folder: Path, variant: str | None) -> Any:
    try:
        model, info = model_class.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, variant=variant
        )
    except Exception as error:  # each library raises errors of its own, up to RuntimeError for wrong shapes
        raise CheckpointError(f"{folder} cannot be loaded: {error}. Download or save the checkpoint again.") from error
    # A text encoder may be shortened by its config alone, and its file keep what is left out. Of others nothing may be.
    if folder.name in ("unet", "vae") and (extra := sorted(map(str, info["unexpected_keys"]))):
        raise CheckpointError(
            f"{folder}: its config.json does not describe {len(extra)} of the weights in its file: {', '.join(extra[:3])} "
            "... They do not belong together; save the checkpoint again."
        )
    # transformers would fill these with random numbers.
    if wrong := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise CheckpointError(
            f"{folder}: {len(wrong)} of the weights that its config.json describes are missing or of another shape: "
            f"{', '.join(wrong[:3])} ... Save the checkpoint again."
        )
    return model


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
