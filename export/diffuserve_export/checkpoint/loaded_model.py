"""The checkpoint's parts once they are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
