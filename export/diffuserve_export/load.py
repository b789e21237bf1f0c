"""The checkpoint's weights as PyTorch modules, in fp32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffuserve.errors import CheckpointError
from diffuserve_export.checkpoint import Checkpoint
from diffuserve_export.quiet import hide_progress_bars, quiet

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer


@dataclass(frozen=True)
class LoadedModel:
    """The parts of a Stable Diffusion pipeline that are exported, in evaluation mode and without gradients."""

    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    unet: UNet2DConditionModel
    vae: AutoencoderKL


def model_from_checkpoint(checkpoint: Checkpoint) -> LoadedModel:
    """Loads the components one by one instead of the pipeline, which would also load what is never exported.

    Raises:
        CheckpointError: a file is damaged, or its weights are not those that its config describes.
    """
    with quiet():
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        hide_progress_bars()
        path = checkpoint.path
        model = LoadedModel(
            text_encoder=_load(CLIPTextModel, path / "text_encoder"),
            tokenizer=_load_tokenizer(CLIPTokenizer, path / "tokenizer"),
            unet=_load(UNet2DConditionModel, path / "unet"),
            vae=_load(AutoencoderKL, path / "vae"),
        )
    entries, vocabulary = len(model.tokenizer), model.text_encoder.config.vocab_size
    if entries > vocabulary:
        raise CheckpointError(
            f"{path}: the tokenizer has {entries} tokens and the text encoder embeds {vocabulary}. They do not belong "
            "together; save the checkpoint again."
        )
    return model


def _load(model_class: Any, folder: Path) -> Any:
    try:
        model, info = model_class.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # each library raises errors of its own, up to RuntimeError for wrong shapes
        raise CheckpointError(f"{folder} cannot be loaded: {error}. Download or save the checkpoint again.") from error
    # transformers would fill these with random numbers.
    if wrong := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise CheckpointError(
            f"{folder}: {len(wrong)} of the weights that its config.json describes are missing or of another shape: "
            f"{', '.join(wrong[:3])} ... Save the checkpoint again."
        )
    return model.float().eval().requires_grad_(False)


def _load_tokenizer(tokenizer_class: Any, folder: Path) -> Any:
    try:
        return tokenizer_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be loaded: {error}. Download or save the checkpoint again.") from error
